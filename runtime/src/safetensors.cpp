#include "safetensors.h"

#include <algorithm>
#include <cstring>

#include "error.h"
#include "json.h"

namespace pockc {
namespace {

constexpr uint64_t kMaxHeaderBytes = 4u << 20;
constexpr const char* kDTypeNames[] = {"F32", "I64", "I32", "U8", "BOOL"};

bool parse_dtype(const std::string& name, DType* out) {
  for (int code = 0; code < 5; ++code) {
    if (name != kDTypeNames[code]) continue;
    *out = static_cast<DType>(code);
    return true;
  }
  return false;
}

bool parse_shape(const Json& shape, SafetensorsFile::Item* item) {
  if (shape.kind != Json::Kind::kArray || shape.items.size() > kMaxRank) return false;
  item->type.rank = static_cast<int32_t>(shape.items.size());
  item->bytes = dtype_size(item->type.dtype);
  for (int axis = 0; axis < item->type.rank; ++axis) {
    const Json& size = shape.items[axis];
    if (!size.integral || size.integer < 1 ||
        static_cast<uint64_t>(size.integer) > (1ull << 40) / item->bytes) {
      return false;
    }
    item->type.dims[axis] = size.integer;
    item->bytes *= static_cast<uint64_t>(size.integer);
  }
  return true;
}

bool parse_item(const Json& json, Bytes data, SafetensorsFile::Item* item) {
  const std::string* dtype = json.find_text("dtype");
  const Json* shape = json.find("shape");
  const Json* offsets = json.find("data_offsets");
  if (dtype == nullptr || shape == nullptr || offsets == nullptr) return false;
  if (!parse_dtype(*dtype, &item->type.dtype) || !parse_shape(*shape, item)) return false;
  if (offsets->kind != Json::Kind::kArray || offsets->items.size() != 2) return false;
  const Json& begin = offsets->items[0];
  const Json& end = offsets->items[1];
  if (!begin.integral || !end.integral || begin.integer < 0 || end.integer < begin.integer) return false;
  const uint64_t first = static_cast<uint64_t>(begin.integer);
  const uint64_t last = static_cast<uint64_t>(end.integer);
  if (last > data.size || last - first != item->bytes) return false;
  item->type.data = const_cast<uint8_t*>(data.data) + first;
  return true;
}

bool parse_metadata(const Json& json, SafetensorsFile* out) {
  if (json.kind != Json::Kind::kObject) return false;
  for (const auto& member : json.members) {
    if (member.second.kind != Json::Kind::kString) return false;
    out->metadata.emplace_back(member.first, member.second.text);
  }
  return true;
}

bool by_name(const SafetensorsFile::Item& a, const SafetensorsFile::Item& b) { return a.name < b.name; }

}  // namespace

const std::string* SafetensorsFile::find_metadata(const char* key) const {
  for (const auto& pair : metadata) {
    if (pair.first == key) return &pair.second;
  }
  return nullptr;
}

const SafetensorsFile::Item* SafetensorsFile::find(const std::string& name) const {
  Item wanted;
  wanted.name = name;
  const auto found = std::lower_bound(items.begin(), items.end(), wanted, by_name);
  return found != items.end() && found->name == name ? &*found : nullptr;
}

Status read_safetensors(const char* what, Bytes bytes, SafetensorsFile* out) {
  uint64_t header_bytes = 0;
  if (bytes.size >= 8) std::memcpy(&header_bytes, bytes.data, 8);
  if (bytes.size < 8 || header_bytes > kMaxHeaderBytes || header_bytes > bytes.size - 8) {
    return fail(PK_BAD_FILE, "%s is cut off or not a safetensors file", what);
  }
  Json header;
  const bool parsed = parse_json(reinterpret_cast<const char*>(bytes.data) + 8, header_bytes, &header);
  if (!parsed || header.kind != Json::Kind::kObject) {
    return fail(PK_BAD_FILE, "%s: the safetensors header is not JSON", what);
  }
  out->data = Bytes{bytes.data + 8 + header_bytes, bytes.size - 8 - header_bytes};
  for (const auto& member : header.members) {
    SafetensorsFile::Item item;
    item.name = member.first;
    const bool is_metadata = item.name == "__metadata__";
    const bool good =
        is_metadata ? parse_metadata(member.second, out) : parse_item(member.second, out->data, &item);
    if (!good) return fail(PK_BAD_FILE, "%s: `%s` is cut off or malformed", what, item.name.c_str());
    if (!is_metadata) out->items.push_back(std::move(item));
  }
  std::sort(out->items.begin(), out->items.end(), by_name);
  for (size_t i = 1; i < out->items.size(); ++i) {
    if (out->items[i - 1].name != out->items[i].name) continue;
    return fail(PK_BAD_FILE, "%s holds `%s` twice", what, out->items[i].name.c_str());
  }
  return PK_OK;
}

std::string safetensors_header(const std::vector<std::pair<std::string, std::string>>& metadata,
                               const std::vector<SafetensorsFile::Item>& items) {
  std::string json = "{\"__metadata__\":{";
  for (size_t i = 0; i < metadata.size(); ++i) {
    json += (i == 0 ? "" : ",") + quote_json(metadata[i].first) + ":" + quote_json(metadata[i].second);
  }
  json += "}";
  uint64_t offset = 0;
  for (const SafetensorsFile::Item& item : items) {
    json += "," + quote_json(item.name) + ":{\"dtype\":\"" + kDTypeNames[static_cast<int>(item.type.dtype)] +
            "\",\"shape\":[";
    for (int axis = 0; axis < item.type.rank; ++axis) {
      json += (axis == 0 ? "" : ",") + std::to_string(item.type.dims[axis]);
    }
    json +=
        "],\"data_offsets\":[" + std::to_string(offset) + "," + std::to_string(offset + item.bytes) + "]}";
    offset += item.bytes;
  }
  json += "}";
  json.append((8 - json.size() % 8) % 8, ' ');
  const uint64_t length = json.size();
  return std::string(reinterpret_cast<const char*>(&length), 8) + json;
}

}  // namespace pockc
