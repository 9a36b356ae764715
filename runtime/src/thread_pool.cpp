// A pool that sleeps: between jobs its workers wait on a condition variable, and so does the caller for them.
//
// Before a thread sleeps it looks out for some microseconds, for the calls of a step follow upon each other
// at once, and many take less time than it takes to wake a thread: 50 us in a virtual machine. Pools that
// spin win on an idle machine and collapse on a shared one. So what is in vain is cut short: each time that
// nothing came, a thread looks out half as long, and where there are fewer CPUs than threads it does not at
// all.
#include <pthread.h>
#include <time.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>

#include "pockc/kernel.h"

namespace pockc {
namespace {
constexpr int kMaxThreads = 256;

int64_t nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<int64_t>(now.tv_sec) * 1000000000 + now.tv_nsec;
}

// Tells the CPU that this is a loop which waits.
void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
  __asm__ volatile("yield" ::: "memory");
#else
  __asm__ volatile("" ::: "memory");
#endif
}

// Whether each of so many threads can have a CPU of its own.
bool has_cpus(int threads) {
#if defined(__linux__)
  cpu_set_t cpus;
  return sched_getaffinity(0, sizeof(cpus), &cpus) == 0 && CPU_COUNT(&cpus) >= threads;
#else
  (void)threads;
  return false;
#endif
}

// How one thread looks out for an event.
class Lookout {
 public:
  void start(bool useful) { patience_ = useful ? kLongest : 0; }

  // Whether the event came meanwhile.
  template <typename Event>
  bool sees(Event&& event) {
    if (event()) return true;
    if (patience_ == 0) return false;
    const int64_t end = nanoseconds() + patience_;
    do {
      for (int look = 0; look < kLooks; ++look) {
        relax();
        if (!event()) continue;
        patience_ = patience_ < kLongest / 2 ? 2 * patience_ : kLongest;
        return true;
      }
    } while (nanoseconds() < end);
    // In time it tries again: of threads that all sleep too early each waits for another to wake up.
    patience_ = ++misses_ % kRetry == 0 ? kLongest : patience_ / 2 > kShortest ? patience_ / 2 : kShortest;
    return false;
  }

 private:
  static constexpr int64_t kLongest = 50000, kShortest = 1000;  // nanoseconds
  static constexpr int kLooks = 16;                             // at the event, for one at the clock
  static constexpr int kRetry = 32;                             // misses
  int64_t patience_ = 0;
  unsigned misses_ = 0;
};

}  // namespace

struct ThreadPool::State {
  struct Worker {
    State* state;
    int index;  // 1 and up: the caller is thread 0
    pthread_t thread;
    Lookout lookout;
  };

  std::mutex mutex;
  std::condition_variable start;
  std::condition_variable done;
  std::atomic<int64_t> job{0};  // counts jobs; a worker runs each once
  std::atomic<int> pending{0};  // workers that have not finished the current job
  std::atomic<bool> stopping{false};
  Lookout lookout;  // the caller's
  Body body = nullptr;
  void* context = nullptr;
  int64_t count = 0;
  int64_t chunk = 0;
  int worker_count = 0;
  Worker workers[kMaxThreads];

  void run_range(int index) const {
    const int64_t begin = chunk * index;
    if (begin >= count) return;
    const int64_t end = count - begin < chunk ? count : begin + chunk;
    body(context, begin, end, index);
  }

  void work(Worker* worker) {
    int64_t seen = 0;
    const auto called = [&] { return stopping || job != seen; };
    for (;;) {
      if (!worker->lookout.sees(called)) {
        std::unique_lock<std::mutex> lock(mutex);
        start.wait(lock, called);
      }
      if (stopping) return;
      seen = job;
      run_range(worker->index);
      if (--pending > 0) continue;
      std::lock_guard<std::mutex> lock(mutex);  // the caller has slept since, or sees that nothing is pending
      done.notify_one();
    }
  }

  // Until all workers have finished.
  void wait() {
    const auto finished = [this] { return pending == 0; };
    if (lookout.sees(finished)) return;
    std::unique_lock<std::mutex> lock(mutex);
    done.wait(lock, finished);
  }

  static void* main(void* argument) {
    Worker* worker = static_cast<Worker*>(argument);
    worker->state->work(worker);
    return nullptr;
  }
};

ThreadPool::ThreadPool(int threads) {
  if (threads > kMaxThreads) threads = kMaxThreads;
  if (threads <= 1) return;
  state_ = new (std::nothrow) State;
  if (state_ == nullptr) return;
  const bool looks_out = has_cpus(threads);
  state_->lookout.start(looks_out);
  for (int index = 1; index < threads; ++index) {
    State::Worker& worker = state_->workers[index];
    worker.state = state_;
    worker.index = index;
    worker.lookout.start(looks_out);
    // A system that refuses another thread gets a smaller pool: results do not depend on its size.
    if (pthread_create(&worker.thread, nullptr, State::main, &worker) != 0) break;
    state_->worker_count = index;
  }
  threads_ = 1 + state_->worker_count;
}

ThreadPool::~ThreadPool() {
  if (state_ == nullptr) return;
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->stopping = true;
  }
  state_->start.notify_all();
  for (int index = 1; index <= state_->worker_count; ++index)
    pthread_join(state_->workers[index].thread, nullptr);
  delete state_;
}

void ThreadPool::parallel_for(int64_t count, int64_t grain, Body body, void* context) {
  if (count <= 0) return;
  if (grain < 1) grain = 1;
  if (threads_ == 1 || count <= grain) {
    body(context, 0, count, 0);
    return;
  }
  const int64_t blocks = (count - 1) / grain + 1;
  const int64_t blocks_each = (blocks - 1) / threads_ + 1;
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->body = body;
    state_->context = context;
    state_->count = count;
    state_->chunk = blocks_each * grain;
    state_->pending = state_->worker_count;
    ++state_->job;
  }
  state_->start.notify_all();
  state_->run_range(0);
  state_->wait();
}

}  // namespace pockc
