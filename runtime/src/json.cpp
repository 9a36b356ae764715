#include "json.h"

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace pockc {
namespace {

constexpr int kMaxDepth = 32;
constexpr size_t kMaxNumberLength = 64;

// Each method consumes what it names and returns false when the text is something else.
class Parser {
 public:
  Parser(const char* text, size_t size) : next_(text), end_(text + size) {}

  bool document(Json* out) { return value(out, 0) && (skip_space(), next_ == end_); }

 private:
  void skip_space() {
    while (next_ < end_ && (*next_ == ' ' || *next_ == '\n' || *next_ == '\r' || *next_ == '\t')) ++next_;
  }

  bool take(char wanted) {
    if (next_ == end_ || *next_ != wanted) return false;
    ++next_;
    return true;
  }

  bool take_after_space(char wanted) {
    skip_space();
    return take(wanted);
  }

  bool word(const char* wanted) {
    const size_t length = std::strlen(wanted);
    if (static_cast<size_t>(end_ - next_) < length || std::memcmp(next_, wanted, length) != 0) return false;
    next_ += length;
    return true;
  }

  bool value(Json* out, int depth) {
    skip_space();
    if (next_ == end_ || depth > kMaxDepth) return false;
    switch (*next_) {
      case '{':
        return object(out, depth);
      case '[':
        return array(out, depth);
      case '"':
        out->kind = Json::Kind::kString;
        return string(&out->text);
      case 't':
        out->kind = Json::Kind::kBool;
        out->boolean = true;
        return word("true");
      case 'f':
        out->kind = Json::Kind::kBool;
        return word("false");
      case 'n':
        return word("null");
      default:
        return number(out);
    }
  }

  bool object(Json* out, int depth) {
    out->kind = Json::Kind::kObject;
    ++next_;
    if (take_after_space('}')) return true;
    do {
      skip_space();
      std::pair<std::string, Json> member;
      if (!string(&member.first) || !take_after_space(':') || !value(&member.second, depth + 1)) return false;
      out->members.push_back(std::move(member));
    } while (take_after_space(','));
    return take('}');
  }

  bool array(Json* out, int depth) {
    out->kind = Json::Kind::kArray;
    ++next_;
    if (take_after_space(']')) return true;
    do {
      out->items.emplace_back();
      if (!value(&out->items.back(), depth + 1)) return false;
    } while (take_after_space(','));
    return take(']');
  }

  bool digits() {
    const char* begin = next_;
    while (next_ < end_ && *next_ >= '0' && *next_ <= '9') ++next_;
    return next_ > begin;
  }

  bool number(Json* out) {
    const char* begin = next_;
    take('-');
    if (!take('0') && !digits()) return false;
    bool integral = true;
    if (take('.')) {
      integral = false;
      if (!digits()) return false;
    }
    if (take('e') || take('E')) {
      integral = false;
      if (!take('+')) take('-');
      if (!digits()) return false;
    }
    const size_t length = static_cast<size_t>(next_ - begin);
    if (length > kMaxNumberLength) return false;
    char text[kMaxNumberLength + 1];
    std::memcpy(text, begin, length);
    text[length] = '\0';
    out->kind = Json::Kind::kNumber;
    out->number = std::strtod(text, nullptr);
    errno = 0;
    out->integer = std::strtoll(text, nullptr, 10);
    out->integral = integral && errno == 0;
    return true;
  }

  bool string(std::string* out) {
    if (!take('"')) return false;
    while (next_ < end_ && *next_ != '"') {
      const unsigned char byte = static_cast<unsigned char>(*next_);
      const bool good = byte < 0x20 ? false : byte == '\\' ? escape(out) : utf8(out);
      if (!good) return false;
    }
    return take('"');
  }

  bool escape(std::string* out) {
    ++next_;
    if (next_ == end_) return false;
    static const char kLetters[] = "\"\\/bfnrt";
    static const char kMeanings[] = "\"\\/\b\f\n\r\t";
    const char letter = *next_++;
    if (letter == 'u') return unicode_escape(out);
    const char* found = letter == '\0' ? nullptr : std::strchr(kLetters, letter);
    if (found == nullptr) return false;
    out->push_back(kMeanings[found - kLetters]);
    return true;
  }

  bool hex4(uint32_t* out) {
    *out = 0;
    for (int i = 0; i < 4; ++i) {
      if (next_ == end_) return false;
      const char c = *next_++;
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) return false;
      *out = *out * 16 + static_cast<uint32_t>(digit);
    }
    return true;
  }

  bool unicode_escape(std::string* out) {
    uint32_t code;
    if (!hex4(&code) || (code >= 0xDC00 && code < 0xE000)) return false;
    if (code >= 0xD800 && code < 0xDC00) {
      uint32_t low;
      if (!word("\\u") || !hex4(&low) || low < 0xDC00 || low >= 0xE000) return false;
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    append_utf8(code, out);
    return true;
  }

  static void append_utf8(uint32_t code, std::string* out) {
    if (code < 0x80) {
      out->push_back(static_cast<char>(code));
      return;
    }
    const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    static const uint32_t kLead[] = {0, 0xC0, 0xE0, 0xF0};
    out->push_back(static_cast<char>(kLead[more] | (code >> (6 * more))));
    for (int i = more - 1; i >= 0; --i) out->push_back(static_cast<char>(0x80 | ((code >> (6 * i)) & 0x3F)));
  }

  // One character, with overlong forms, surrogates and codes above U+10FFFF refused.
  bool utf8(std::string* out) {
    const unsigned char lead = static_cast<unsigned char>(*next_);
    const int more = lead < 0x80                   ? 0
                     : lead >= 0xC2 && lead < 0xE0 ? 1
                     : lead >= 0xE0 && lead < 0xF0 ? 2
                     : lead < 0xF5                 ? 3
                                                   : -1;
    if (more < 0 || (more == 3 && lead < 0xF0) || end_ - next_ <= more) return false;
    static const uint32_t kMask[] = {0x7F, 0x1F, 0x0F, 0x07};
    static const uint32_t kSmallest[] = {0, 0x80, 0x800, 0x10000};
    uint32_t code = lead & kMask[more];
    for (int i = 1; i <= more; ++i) {
      const unsigned char byte = static_cast<unsigned char>(next_[i]);
      if ((byte & 0xC0) != 0x80) return false;
      code = (code << 6) | (byte & 0x3F);
    }
    if (code < kSmallest[more] || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) return false;
    out->append(next_, static_cast<size_t>(more) + 1);
    next_ += more + 1;
    return true;
  }

  const char* next_;
  const char* end_;
};

}  // namespace

const Json* Json::find(const char* key) const {
  for (const auto& member : members) {
    if (member.first == key) return &member.second;
  }
  return nullptr;
}

const std::string* Json::find_text(const char* key) const {
  const Json* member = find(key);
  return member != nullptr && member->kind == Kind::kString ? &member->text : nullptr;
}

bool parse_json(const char* text, size_t size, Json* out) {
  *out = Json();
  return Parser(text, size).document(out);
}

std::string quote_json(const std::string& value) {
  std::string out = "\"";
  for (const char c : value) {
    const unsigned char byte = static_cast<unsigned char>(c);
    if (byte < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof(escape), "\\u%04x", byte);
      out += escape;
      continue;
    }
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + "\"";
}

}  // namespace pockc
