// A small strict JSON parser for untrusted text, and the escaping that a writer needs.
#ifndef POCKC_SRC_JSON_H_
#define POCKC_SRC_JSON_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace pockc {

struct Json {
  enum class Kind : uint8_t { kNull, kBool, kNumber, kString, kArray, kObject };

  Kind kind = Kind::kNull;
  bool boolean = false;
  bool integral = false;  // a number without fraction and exponent that fits into `integer`
  int64_t integer = 0;
  double number = 0;
  std::string text;
  std::vector<Json> items;
  std::vector<std::pair<std::string, Json>> members;

  // The member of an object, or null.
  const Json* find(const char* key) const;
  // The text of a string member, or null.
  const std::string* find_text(const char* key) const;
};

// RFC 8259 with UTF-8 checked and at most 32 levels; false when `size` bytes are anything else.
bool parse_json(const char* text, size_t size, Json* out);

// `value` (UTF-8) as a JSON string with quotes.
std::string quote_json(const std::string& value);

}  // namespace pockc

#endif  // POCKC_SRC_JSON_H_
