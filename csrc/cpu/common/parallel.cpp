#include "cpu/common/parallel.h"

#include <condition_variable>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace lldfast {

void run_team(int n, void (*task)(void*, int), void* context) {
  if (n == 1) return task(context, 0);
  // Nobody begins before all are there: a team with a member missing would wait for it at its first barrier.
  std::mutex mutex;
  std::condition_variable decided;
  int answer = 0;  // 1: begin, -1: go home
  const auto decide = [&](int value) {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      answer = value;
    }
    decided.notify_all();
  };
  const auto member = [&](int i) {
    {
      std::unique_lock<std::mutex> lock(mutex);
      decided.wait(lock, [&] { return answer != 0; });
    }
    if (answer > 0) task(context, i);
  };
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < n; ++i) others.emplace_back(member, i);
  } catch (const std::exception& error) {
    decide(-1);
    for (std::thread& thread : others) thread.join();
    throw std::runtime_error("cannot start " + std::to_string(n) + " threads (" + error.what() +
                             "): ask for fewer with torch.set_num_threads");
  }
  decide(1);
  task(context, 0);
  for (std::thread& thread : others) thread.join();
}

struct Barrier::State {
  std::mutex mutex;
  std::condition_variable all_here;
  const int n;
  int waiting = 0;
  int64_t round = 0;

  explicit State(int members) : n(members) {}
};

Barrier::Barrier(int n) : state_(new State(n)) {}
Barrier::~Barrier() {
  delete state_;
}

void Barrier::wait() {
  if (state_->n == 1) return;
  std::unique_lock<std::mutex> lock(state_->mutex);
  const int64_t round = state_->round;
  if (++state_->waiting == state_->n) {
    state_->waiting = 0;
    ++state_->round;
    state_->all_here.notify_all();
  } else {
    state_->all_here.wait(lock, [&] { return state_->round != round; });
  }
}

Buffer::Buffer(size_t bytes) : data_(static_cast<uint8_t*>(::operator new(bytes, std::align_val_t(64)))) {}
Buffer::~Buffer() {
  ::operator delete(data_, std::align_val_t(64));
}

}  // namespace lldfast
