// A pool that sleeps: workers wait on a condition variable between jobs. Spinning pools win microseconds on
// an idle machine and collapse on a shared one.
#include <pthread.h>

#include <condition_variable>
#include <mutex>
#include <new>

#include "pockc/kernel.h"

namespace pockc {
namespace {
constexpr int kMaxThreads = 256;
}

struct ThreadPool::State {
  struct Worker {
    State* state;
    int index;  // 1 and up: the caller is thread 0
    pthread_t thread;
  };

  std::mutex mutex;
  std::condition_variable start;
  std::condition_variable done;
  int64_t job = 0;  // counts jobs; a worker runs each once
  int pending = 0;  // workers that have not finished the current job
  bool stopping = false;
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

  void work(int index) {
    int64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      start.wait(lock, [&] { return stopping || job != seen; });
      if (stopping) return;
      seen = job;
      lock.unlock();
      run_range(index);
      lock.lock();
      if (--pending == 0) done.notify_one();
    }
  }

  static void* main(void* argument) {
    Worker* worker = static_cast<Worker*>(argument);
    worker->state->work(worker->index);
    return nullptr;
  }
};

ThreadPool::ThreadPool(int threads) {
  if (threads > kMaxThreads) threads = kMaxThreads;
  if (threads <= 1) return;
  state_ = new (std::nothrow) State;
  if (state_ == nullptr) return;
  for (int index = 1; index < threads; ++index) {
    State::Worker& worker = state_->workers[index];
    worker.state = state_;
    worker.index = index;
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
  std::unique_lock<std::mutex> lock(state_->mutex);
  state_->done.wait(lock, [this] { return state_->pending == 0; });
}

}  // namespace pockc
