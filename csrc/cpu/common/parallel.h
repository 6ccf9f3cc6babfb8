// Threads and scratch memory of the CPU kernels. Compiled for the baseline only: a file of one instruction set must not
// instantiate templates of the standard library, since the linker may keep its copy for the whole program.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lldfast {

// Calls task(context, i) for i in [0, n), each on a thread of its own, the caller being number 0; returns when all are
// done. The threads live for one call, so a process that forks between calls loses none.
void run_team(int n, void (*task)(void*, int), void* context);

// All n members of a team wait for each other; reusable.
class Barrier {
 public:
  explicit Barrier(int n);
  ~Barrier();
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;
  void wait();

 private:
  struct State;
  State* state_;
};

// Hands out 0, 1, 2, ... to the members of a team.
class Counter {
 public:
  int64_t next() { return __atomic_fetch_add(&value_, 1, __ATOMIC_RELAXED); }

 private:
  int64_t value_ = 0;
};

// Uninitialised memory, aligned to a cache line. Throws std::bad_alloc.
class Buffer {
 public:
  explicit Buffer(size_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  uint8_t* bytes() const { return data_; }
  float* floats() const { return reinterpret_cast<float*>(data_); }

 private:
  uint8_t* data_;
};

}  // namespace lldfast
