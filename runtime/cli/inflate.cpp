#include "inflate.h"

#include <cstring>

namespace pockc::cli {
namespace {

constexpr int kMaxBits = 15;
constexpr int kLiteralCodes = 288;
constexpr int kDistanceCodes = 30;

// A canonical Huffman code: how many codes there are of each length, and the symbols in the order of their
// codes.
struct Huffman {
  uint16_t count[kMaxBits + 1] = {};
  uint16_t symbol[kLiteralCodes] = {};

  // False when the lengths over-subscribe the code. An incomplete code is legal for a single distance.
  bool build(const uint8_t* lengths, int symbols) {
    std::memset(count, 0, sizeof(count));
    for (int i = 0; i < symbols; ++i) ++count[lengths[i]];
    int left = 1;
    for (int length = 1; length <= kMaxBits; ++length) {
      left = left * 2 - count[length];
      if (left < 0) return false;
    }
    uint16_t offset[kMaxBits + 2] = {};
    for (int length = 1; length <= kMaxBits; ++length) {
      offset[length + 1] = static_cast<uint16_t>(offset[length] + count[length]);
    }
    for (int i = 0; i < symbols; ++i) {
      if (lengths[i] != 0) symbol[offset[lengths[i]]++] = static_cast<uint16_t>(i);
    }
    count[0] = 0;
    return true;
  }
};

class Inflater {
 public:
  Inflater(const uint8_t* in, size_t in_size, uint8_t* out, size_t out_size)
      : in_(in), in_size_(in_size), out_(out), out_size_(out_size) {}

  bool run() {
    bool last = false;
    while (!last) {
      last = bits(1) != 0;
      if (!block(bits(2)) || failed_) return false;
    }
    return written_ == out_size_;
  }

 private:
  bool block(uint32_t kind) {
    switch (kind) {
      case 0:
        return stored();
      case 1:
        return fixed_codes();
      case 2:
        return dynamic_codes();
      default:
        return false;
    }
  }

  // `count` bits, at most 16, least significant first; zeros and failed_ past the end.
  uint32_t bits(int count) {
    while (bit_count_ < count) {
      if (position_ == in_size_) {
        failed_ = true;
        return 0;
      }
      bit_buffer_ |= static_cast<uint32_t>(in_[position_++]) << bit_count_;
      bit_count_ += 8;
    }
    const uint32_t value = bit_buffer_ & ((1u << count) - 1);
    bit_buffer_ >>= count;
    bit_count_ -= count;
    return value;
  }

  // -1 when no code matches. Walks the code one bit at a time: `first` is the first code of the current
  // length.
  int decode(const Huffman& huffman) {
    int code = 0, first = 0, index = 0;
    for (int length = 1; length <= kMaxBits; ++length) {
      code |= static_cast<int>(bits(1));
      if (failed_) return -1;
      const int count = huffman.count[length];
      if (code - first < count) return huffman.symbol[index + code - first];
      index += count;
      first = (first + count) * 2;
      code *= 2;
    }
    return -1;
  }

  bool stored() {
    bit_buffer_ = 0;
    bit_count_ = 0;
    if (in_size_ - position_ < 4) return false;
    const size_t length = in_[position_] | static_cast<size_t>(in_[position_ + 1]) << 8;
    const size_t inverse = in_[position_ + 2] | static_cast<size_t>(in_[position_ + 3]) << 8;
    position_ += 4;
    if ((length ^ inverse) != 0xFFFF || length > in_size_ - position_ || length > out_size_ - written_)
      return false;
    std::memcpy(out_ + written_, in_ + position_, length);
    position_ += length;
    written_ += length;
    return true;
  }

  bool fixed_codes() {
    uint8_t lengths[kLiteralCodes];
    for (int i = 0; i < kLiteralCodes; ++i) lengths[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8;
    Huffman literals, distances;
    if (!literals.build(lengths, kLiteralCodes)) return false;
    std::memset(lengths, 5, kDistanceCodes);
    return distances.build(lengths, kDistanceCodes) && codes(literals, distances);
  }

  bool dynamic_codes() {
    static const uint8_t kOrder[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    const int literal_count = static_cast<int>(bits(5)) + 257;
    const int distance_count = static_cast<int>(bits(5)) + 1;
    const int length_count = static_cast<int>(bits(4)) + 4;
    if (failed_ || literal_count > 286 || distance_count > kDistanceCodes) return false;
    uint8_t lengths[kLiteralCodes + kDistanceCodes] = {};
    for (int i = 0; i < length_count; ++i) lengths[kOrder[i]] = static_cast<uint8_t>(bits(3));
    Huffman huffman;
    if (failed_ || !huffman.build(lengths, 19)) return false;
    if (!code_lengths(huffman, literal_count + distance_count, lengths) || lengths[256] == 0) return false;
    Huffman literals, distances;
    return literals.build(lengths, literal_count) &&
           distances.build(lengths + literal_count, distance_count) && codes(literals, distances);
  }

  // The lengths of both codes, themselves run-length coded: 16 repeats the last, 17 and 18 repeat zero.
  bool code_lengths(const Huffman& huffman, int wanted, uint8_t* lengths) {
    for (int filled = 0; filled < wanted;) {
      const int symbol = decode(huffman);
      if (symbol < 0) return false;
      if (symbol < 16) {
        lengths[filled++] = static_cast<uint8_t>(symbol);
        continue;
      }
      if (symbol == 16 && filled == 0) return false;
      const uint8_t value = symbol == 16 ? lengths[filled - 1] : 0;
      int repeat = symbol == 16   ? 3 + static_cast<int>(bits(2))
                   : symbol == 17 ? 3 + static_cast<int>(bits(3))
                                  : 11 + static_cast<int>(bits(7));
      if (failed_ || filled + repeat > wanted) return false;
      while (repeat-- > 0) lengths[filled++] = value;
    }
    return true;
  }

  bool codes(const Huffman& literals, const Huffman& distances) {
    static const uint16_t kLengthBase[29] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                             31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
    static const uint8_t kLengthExtra[29] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2,
                                             2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
    static const uint16_t kDistanceBase[30] = {1,    2,    3,    4,    5,    7,    9,    13,    17,    25,
                                               33,   49,   65,   97,   129,  193,  257,  385,   513,   769,
                                               1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
    static const uint8_t kDistanceExtra[30] = {0, 0, 0, 0, 1, 1, 2, 2,  3,  3,  4,  4,  5,  5,  6,
                                               6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13};
    for (;;) {
      const int symbol = decode(literals);
      if (symbol < 0) return false;
      if (symbol == 256) return true;
      if (symbol < 256) {
        if (written_ == out_size_) return false;
        out_[written_++] = static_cast<uint8_t>(symbol);
        continue;
      }
      if (symbol > 285) return false;
      const size_t length = kLengthBase[symbol - 257] + bits(kLengthExtra[symbol - 257]);
      const int code = decode(distances);
      if (code < 0 || code >= kDistanceCodes) return false;
      const size_t distance = kDistanceBase[code] + bits(kDistanceExtra[code]);
      if (failed_ || distance > written_ || length > out_size_ - written_) return false;
      // Byte by byte: the source may run into what is being written.
      for (size_t i = 0; i < length; ++i, ++written_) out_[written_] = out_[written_ - distance];
    }
  }

  const uint8_t* in_;
  size_t in_size_;
  uint8_t* out_;
  size_t out_size_;
  size_t position_ = 0;
  size_t written_ = 0;
  uint32_t bit_buffer_ = 0;
  int bit_count_ = 0;
  bool failed_ = false;
};

}  // namespace

bool inflate(const uint8_t* in, size_t in_size, uint8_t* out, size_t out_size) {
  return Inflater(in, in_size, out, out_size).run();
}

}  // namespace pockc::cli
