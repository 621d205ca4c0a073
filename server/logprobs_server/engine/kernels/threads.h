// The kernels' own threads. One team for the process: its members wait, spin a little, and run one function together, a
// section of it after the other, so that a whole pass of the model starts threads once. Not OpenMP: as soon as two threads
// of a process use that, its workers sleep sooner and wake later (measured: a decode step of 9.5 ms took 17.9).
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

namespace logprobs {

constexpr int kSpins = 2000;  // pauses before a waiting thread lets others have its processor: some 20 microseconds
// Times that an idle thread then lets others go first before it sleeps: some milliseconds, longer than what comes between
// two runs of a step. An idle processor may take 2 ms to come back, in which the others run alone (16 streams on a virtual
// machine, with 500: p99 / p50 between messages 1.33, now 1.18).
constexpr int kYields = 8000;
constexpr std::chrono::milliseconds kGiven{5};  // a member lets others go first until they took so long of a run

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

  // Calls f on the caller and on every other member that comes in time; returns when all have returned. Calls of several
  // threads queue.
  void run(const std::function<void()>& f) {
    const std::lock_guard<std::mutex> lock(running_);
    work_ = &f;
    for (int64_t i = 0; i < size_; ++i) shares_[i].taken.store(0, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    const uint32_t turn = (turn_.load() / kSizes + 1) * kSizes + static_cast<uint32_t>(size_);
    const uint64_t open = at(turn);
    inside_.store(open, std::memory_order_release);
    if (size_ > 1) {
      turn_.store(turn, std::memory_order_release);
      turn_.notify_all();
    }
    section_ = 0, given_ = {};
    f();
    spin_until([&] {
      uint64_t empty = open;
      return inside_.compare_exchange_strong(empty, 0, std::memory_order_acquire, std::memory_order_relaxed);
    });
  }

  // A section of what `run` runs, the same for every member: f(i) for each i below `count`. Returns when all is done. Each
  // member has a share of its own, the same part of every `count`, so that what it wrote is in its caches; who is done
  // helps the others. Nobody waits for a member that holds nothing: it lets a thread that waits for its processor have
  // it, the one that sends a message say, and finds the sections that it missed done. So what it reads between two
  // sections may be later than both; then it is not used. (16 streams on two cores, when members met at barriers and kept
  // their processors until the scheduler's next tick: p99 / p50 between messages 1.32, now 1.16, steps 0.93 as long.)
  template <class F>
  void each(int64_t count, F f) {
    const uint64_t first = at(++section_), last = first + static_cast<uint64_t>(count);
    if (count == 0) return;
    give_way();
    uint64_t finished = 0;
    for (int64_t turn = 0; turn < size_; ++turn) {
      const int64_t owner = (member_ + turn) % size_, begin = owner * count / size_;
      const uint64_t end = first + static_cast<uint64_t>((owner + 1) * count / size_ - begin);
      std::atomic<uint64_t>& taken = shares_[owner].taken;
      for (uint64_t seen = taken.load(std::memory_order_relaxed), next; (next = std::max(seen, first)) < end;) {
        if (!taken.compare_exchange_weak(seen, next + 1, std::memory_order_relaxed)) continue;
        f(begin + static_cast<int64_t>(next - first));
        ++finished;
        seen = taken.load(std::memory_order_relaxed);
      }
    }
    if (finished > 0)
      for (uint64_t seen = done_.load(std::memory_order_relaxed);
           !done_.compare_exchange_weak(seen, std::max(seen, first) + finished, std::memory_order_acq_rel);) {
      }
    spin_until([&] { return done_.load(std::memory_order_acquire) >= last; });
  }

 private:
  Team() { resize(std::max(1u, std::thread::hardware_concurrency())); }

  static uint64_t at(uint64_t number) { return number << 32; }

  // Lets a thread that waits for this processor have it. Not again and again: a busy one would take nearly all.
  static void give_way() {
    if (given_ > kGiven) return;
    const auto start = std::chrono::steady_clock::now();
    std::this_thread::yield();
    given_ += std::chrono::steady_clock::now() - start;
  }

  void serve(int64_t index, uint32_t seen) {
    member_ = index;
    for (;;) {
      for (int spins = 0; spins < kSpins + kYields && turn_.load(std::memory_order_acquire) == seen; ++spins)
        spins < kSpins ? _mm_pause() : std::this_thread::yield();
      turn_.wait(seen, std::memory_order_acquire);
      seen = turn_.load(std::memory_order_acquire);
      if (index >= seen % kSizes) continue;
      uint64_t inside = at(seen);
      while (inside >> 32 == seen && !inside_.compare_exchange_weak(inside, inside + 1, std::memory_order_acquire)) {
      }
      if (inside >> 32 != seen) continue;  // came too late
      section_ = 0, given_ = {};
      (*work_)();
      inside_.fetch_sub(1, std::memory_order_release);
    }
  }

  struct alignas(64) Share {
    std::atomic<uint64_t> taken{0};  // of the newest section, whose number is above
  };

  static constexpr uint32_t kSizes = 1 << 12;
  static inline thread_local int64_t member_ = 0;    // whoever calls `run` is the first
  static inline thread_local uint64_t section_ = 0;  // in this run, from 1
  static inline thread_local std::chrono::steady_clock::duration given_{};  // in this run, to others

  std::mutex running_;
  const std::function<void()>* work_ = nullptr;
  int64_t size_ = 1, started_ = 1;
  std::unique_ptr<Share[]> shares_;  // of each member
  alignas(64) std::atomic<uint32_t> turn_{0};  // number of the run, and how many members it has
  alignas(64) std::atomic<uint64_t> inside_{0};  // members at work besides the caller, above them the run's turn
  alignas(64) std::atomic<uint64_t> done_{0};    // of the newest section, whose number is above
};

}  // namespace logprobs
