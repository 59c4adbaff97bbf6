// Threads: torch's own OpenMP pool where there is one, so that two pools do not fight for the
// cores (an idle OpenMP thread spins for milliseconds); else threads of our own.
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

#include "operand.h"

namespace kvfold {
namespace {

struct Job {
  void (*work)(void*, int64_t);
  void* context;
  int64_t tasks;
  std::atomic<int64_t> next{0};
};

void drain(void* job_) {
  Job& job = *static_cast<Job*>(job_);
  for (;;) {
    const int64_t task = job.next.fetch_add(1, std::memory_order_relaxed);
    if (task >= job.tasks) return;
    job.work(job.context, task);
  }
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel gomp() {
#if defined(_WIN32)
  return nullptr;
#else
  // torch loads its libraries into the global scope
  static const GompParallel found =
      reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#endif
}

// workers that wait for jobs; one job at a time
class Pool {
 public:
  void run(Job& job, int threads) {
    std::lock_guard<std::mutex> one(turn_);
    while (static_cast<int>(count_) < threads - 1) {
      std::thread(&Pool::work, this, count_++).detach();
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      wanted_ = busy_ = threads - 1;
      ++generation_;
    }
    wake_.notify_all();
    drain(&job);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    job_ = nullptr;
  }

 private:
  void work(int index) {
    uint64_t seen = 0;
    for (;;) {
      Job* job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen && job_ != nullptr; });
        seen = generation_;
        if (index >= wanted_) continue;
        job = job_;
      }
      drain(job);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int count_ = 0, wanted_ = 0, busy_ = 0;
  uint64_t generation_ = 0;
};

}  // namespace

void parallel(void (*work)(void*, int64_t), void* context, int64_t tasks, int threads) {
  Job job{work, context, tasks};
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1) {
    drain(&job);
  } else if (GompParallel run = gomp()) {
    run(drain, &job, static_cast<unsigned>(threads), 0);
  } else {
    static Pool* pool = new Pool;  // never destroyed: its threads wait for as long as we live
    pool->run(job, threads);
  }
}

void* scratch(int slot, int64_t bytes) {
  struct Arena {
    std::vector<uint64_t> memory[3];
  };
  static thread_local Arena arena;
  std::vector<uint64_t>& memory = arena.memory[slot];
  const size_t words = static_cast<size_t>(bytes + 7) / 8 + 16;
  if (memory.size() < words) memory.resize(words);
  return memory.data();
}

}  // namespace kvfold
