// A test harness that fits on a screen. TEST("a sentence") { CHECK(...); }  and at the end  int main() {
// return run_tests(); }
#ifndef POCKC_TEST_CHECK_H_
#define POCKC_TEST_CHECK_H_

#include <cstdio>
#include <string>
#include <vector>

#include "pockc/runtime.h"

namespace pockc::test {

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> list;
  return list;
}

inline int& failures() {
  static int count = 0;
  return count;
}

struct Registration {
  Registration(const char* name, void (*body)()) { tests().push_back(Test{name, body}); }
};

inline void report(const char* file, int line, const char* text) {
  std::printf("  %s:%d: %s (last error: %s)\n", file, line, text, pk_last_error());
  ++failures();
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

inline int run_tests() {
  int failed = 0;
  for (const Test& test : tests()) {
    const int before = failures();
    test.body();
    const bool bad = failures() != before;
    failed += bad ? 1 : 0;
    std::printf("%s %s\n", bad ? "FAIL" : "ok  ", test.name);
  }
  std::printf("%d passed, %d failed\n", static_cast<int>(tests().size()) - failed, failed);
  return failed == 0 ? 0 : 1;
}

}  // namespace pockc::test

#define POCKC_JOIN_(a, b) a##b
#define POCKC_JOIN(a, b) POCKC_JOIN_(a, b)
#define TEST(name)                                                                                         \
  static void POCKC_JOIN(test_, __LINE__)();                                                               \
  static const pockc::test::Registration POCKC_JOIN(registration_, __LINE__)(name,                         \
                                                                             POCKC_JOIN(test_, __LINE__)); \
  static void POCKC_JOIN(test_, __LINE__)()
#define CHECK(condition)                                                                \
  do {                                                                                  \
    if (!(condition)) pockc::test::report(__FILE__, __LINE__, "CHECK(" #condition ")"); \
  } while (false)
// Checks that cannot be survived.
#define REQUIRE(condition)                                                \
  do {                                                                    \
    if (!(condition)) {                                                   \
      pockc::test::report(__FILE__, __LINE__, "REQUIRE(" #condition ")"); \
      return;                                                             \
    }                                                                     \
  } while (false)

#endif  // POCKC_TEST_CHECK_H_
