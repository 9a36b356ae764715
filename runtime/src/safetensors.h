// The safetensors format: u64 header length, JSON header, tensor data. Bounded reader and header writer.
#ifndef POCKC_SRC_SAFETENSORS_H_
#define POCKC_SRC_SAFETENSORS_H_

#include <string>
#include <utility>
#include <vector>

#include "program.h"

namespace pockc {

struct SafetensorsFile {
  struct Item {
    std::string name;
    Tensor type;  // data: of any alignment, inside the bytes that were read
    uint64_t bytes = 0;
  };

  std::vector<std::pair<std::string, std::string>> metadata;
  std::vector<Item> items;
  Bytes data;

  const std::string* find_metadata(const char* key) const;
  const Item* find(const std::string& name) const;
};

// `what` names the bytes in messages. The result points into them.
Status read_safetensors(const char* what, Bytes bytes, SafetensorsFile* out);

// The bytes before the data, with its length in front and padded so that the data starts at a multiple of 8.
// Items lie in the data one after the other in their order.
std::string safetensors_header(const std::vector<std::pair<std::string, std::string>>& metadata,
                               const std::vector<SafetensorsFile::Item>& items);

}  // namespace pockc

#endif  // POCKC_SRC_SAFETENSORS_H_
