// Counts heap allocations of the whole process. Include in one file of a test program.
#ifndef POCKC_TEST_ALLOCATION_COUNTER_H_
#define POCKC_TEST_ALLOCATION_COUNTER_H_

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace pockc::test {
inline std::atomic<int64_t> allocation_count{0};
inline std::atomic<size_t> largest_allocation{0};

inline void count_allocation(size_t size) {
  ++allocation_count;
  if (size > largest_allocation) largest_allocation = size;
}
}  // namespace pockc::test

#if defined(__SANITIZE_ADDRESS__)
// As in sanitizer/allocator_interface.h, which not every compiler package has.
extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*)(const volatile void*, size_t),
                                                         void (*)(const volatile void*));

namespace pockc::test {
inline const int hooks = __sanitizer_install_malloc_and_free_hooks(
    [](const volatile void*, size_t size) { count_allocation(size); }, [](const volatile void*) {});
}  // namespace pockc::test
#else
// glibc resolves these before its own; operator new comes through malloc.
extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

void* malloc(size_t size) {
  pockc::test::count_allocation(size);
  return __libc_malloc(size);
}
void* calloc(size_t count, size_t size) {
  pockc::test::count_allocation(count * size);
  return __libc_calloc(count, size);
}
void* realloc(void* old, size_t size) {
  pockc::test::count_allocation(size);
  return __libc_realloc(old, size);
}
void* memalign(size_t alignment, size_t size) {
  pockc::test::count_allocation(size);
  return __libc_memalign(alignment, size);
}
void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }
int posix_memalign(void** out, size_t alignment, size_t size) {
  *out = memalign(alignment, size);
  return *out == nullptr ? 12 : 0;
}
}
#endif

#endif  // POCKC_TEST_ALLOCATION_COUNTER_H_
