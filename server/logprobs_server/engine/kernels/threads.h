// The kernels' own threads. One team for the process: its members wait, spin a little, run one function together and
// meet at barriers inside it, so that a whole pass of the model starts threads once. Not OpenMP: as soon as two threads
// of a process use that, its workers sleep sooner and wake later (measured: a decode step of 9.5 ms took 17.9).
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

namespace logprobs {

constexpr int kYields = 500;  // times that an idle thread then lets others go first before it sleeps
constexpr int kSpins = 2000;  // pauses before a waiting thread lets others have its processor: some 20 microseconds

template <class Done>
void spin_until(Done done) {
  for (int spins = 0; !done(); ++spins) {
    if (spins < kSpins)
      _mm_pause();
    else
      std::this_thread::yield();
  }
}

class Team {
 public:
  // Never destroyed: its threads end with the process.
  static Team& get() {
    static Team* team = new Team;
    return *team;
  }

  int64_t size() const { return size_; }

  // How many threads run together from now on, the caller's included.
  void resize(int64_t size) {
    size = std::clamp<int64_t>(size, 1, kSizes - 1);
    const std::lock_guard<std::mutex> lock(running_);
    const uint32_t turn = turn_.load();
    for (; started_ < size; ++started_) std::thread([this, index = started_, turn] { serve(index, turn); }).detach();
    if (size > size_ || shares_ == nullptr) shares_ = std::make_unique<Share[]>(size);
    size_ = size;
  }

  // Calls f on every member, the caller among them; returns when all have returned. Calls of several threads queue.
  void run(const std::function<void()>& f) {
    const std::lock_guard<std::mutex> lock(running_);
    work_ = &f;
    busy_.store(size_ - 1, std::memory_order_relaxed);
    if (size_ > 1) {
      turn_.store((turn_.load() / kSizes + 1) * kSizes + static_cast<uint32_t>(size_), std::memory_order_release);
      turn_.notify_all();
    }
    f();
    spin_until([this] { return busy_.load(std::memory_order_acquire) == 0; });
  }

  // Inside `run`, by every member: f(i) for each i below `count`. All wait for the end. Each member has a share of its
  // own, the same part of every `count`, so that what it wrote is in its caches; who is done helps the others.
  template <class F>
  void each(int64_t count, F f) {
    for (int64_t turn = 0; turn < size_; ++turn) {
      const int64_t owner = (member_ + turn) % size_, begin = owner * count / size_;
      const int64_t size = (owner + 1) * count / size_ - begin;
      std::atomic<int64_t>& taken = shares_[owner].taken;  // looked at before it is taken hold of: most shares are done
      for (int64_t i; taken.load(std::memory_order_relaxed) < size && (i = taken++) < size;) f(begin + i);
    }
    barrier();
  }

 private:
  Team() { resize(std::max(1u, std::thread::hardware_concurrency())); }

  void barrier() {
    const uint32_t generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      for (int64_t i = 0; i < size_; ++i) shares_[i].taken.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
    } else {
      spin_until([&] { return generation_.load(std::memory_order_acquire) != generation; });
    }
  }

  void serve(int64_t index, uint32_t seen) {
    member_ = index;
    for (;;) {
      for (int spins = 0; spins < kSpins + kYields && turn_.load(std::memory_order_acquire) == seen; ++spins)
        spins < kSpins ? _mm_pause() : std::this_thread::yield();
      turn_.wait(seen, std::memory_order_acquire);
      seen = turn_.load(std::memory_order_acquire);
      if (index >= seen % kSizes) continue;
      (*work_)();
      busy_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  struct alignas(64) Share {
    std::atomic<int64_t> taken{0};
  };

  static constexpr uint32_t kSizes = 1 << 12;
  static inline thread_local int64_t member_ = 0;  // whoever calls `run` is the first

  std::mutex running_;
  const std::function<void()>* work_ = nullptr;
  int64_t size_ = 1, started_ = 1;
  std::unique_ptr<Share[]> shares_;  // of each member
  alignas(64) std::atomic<uint32_t> turn_{0};  // number of the run, and how many members it has
  alignas(64) std::atomic<int64_t> busy_{0};
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
};

}  // namespace logprobs
