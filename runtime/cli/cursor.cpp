#include "cursor.h"

#include "json.h"
#include "measure.h"

namespace pockc::cli {
namespace {

bool read_count(const Json& json, const char* key, int64_t* out) {
  const Json* value = json.find(key);
  if (value == nullptr || !value->integral || value->integer < 0) return false;
  *out = value->integer;
  return true;
}

bool read_number(const Json& json, const char* key, double* out) {
  const Json* value = json.find(key);
  if (value == nullptr || value->kind != Json::Kind::kNumber) return false;
  *out = value->number;
  return true;
}

}  // namespace

std::string Cursor::json() const {
  JsonObject object;
  object.add("epoch", epoch).add("step", step).add("seed", seed).add("samples", samples);
  object.add("loss_sum", loss_sum).add("held_out", held_out);
  object.add("best_epoch", best_epoch).add("best_loss", best_loss).add("retries", retries);
  return object.text();
}

bool Cursor::parse(const std::string& text) {
  Json json;
  if (!parse_json(text.data(), text.size(), &json)) return false;
  const bool good = read_count(json, "epoch", &epoch) && read_count(json, "step", &step) &&
                    read_count(json, "seed", &seed) && read_count(json, "samples", &samples) &&
                    read_number(json, "loss_sum", &loss_sum);
  if (!good || json.find("held_out") == nullptr) return good;
  return read_count(json, "held_out", &held_out) && read_count(json, "best_epoch", &best_epoch) &&
         read_number(json, "best_loss", &best_loss) && read_count(json, "retries", &retries);
}

}  // namespace pockc::cli
