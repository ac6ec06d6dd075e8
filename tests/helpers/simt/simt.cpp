// Runs the threads of a block as fibers, one after another between barriers, and watches them:
// every barrier must be reached by all threads of the block (or warp) at the same place, no thread
// may touch memory outside its buffers.
#include <cuda_runtime.h>

#include <csetjmp>
#include <csignal>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

namespace simt {

dim3 thread, block;

namespace {

constexpr std::size_t kStackSize = 128 * 1024;
constexpr unsigned kWarpSize = 32;
constexpr std::size_t kSlotSize = 64;

enum class State { kReady, kAtWarpBarrier, kAtBlockBarrier, kFinished };

struct Copy {
  void* to;
  const void* from;
  std::size_t size;
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackSize]};
  ucontext_t context;
  jmp_buf resume;
  bool started;
  State state;
  std::string place;
  std::vector<Copy> copies;
  int parity;
  bool vote;
  alignas(16) unsigned char slots[2][kSlotSize];
};

// A buffer between inaccessible pages; its end touches the upper one, NaNs fill the gap below it.
struct Guarded {
  unsigned char* pages;
  std::size_t n_pages_bytes, size;

  explicit Guarded(std::size_t size) : size(size) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    n_pages_bytes = (size + page - 1) / page * page + 2 * page;
    pages = static_cast<unsigned char*>(
        mmap(nullptr, n_pages_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (pages == MAP_FAILED) throw std::runtime_error("simt: no memory");
    std::memset(pages, 0xff, n_pages_bytes);
    mprotect(pages, page, PROT_NONE);
    mprotect(pages + n_pages_bytes - page, page, PROT_NONE);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(pages, n_pages_bytes); }

  unsigned char* data() const {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    return pages + n_pages_bytes - page - size;
  }
  bool intact() const {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    return std::all_of(pages + page, data(), [](unsigned char c) { return c == 0xff; });
  }
};

std::vector<Fiber> fibers;
unsigned n_threads, current;
const std::function<void()>* body;
Guarded* shared;
jmp_buf scheduler;
std::string fault;
bool running = false;

// Set by the tests.
int order_of_threads = 0, skipped_line = -1;
std::map<int, int> barrier_lines;
std::map<void*, std::unique_ptr<Guarded>> buffers;
std::string shortened_part;  // 8 bytes short
int n_launches = 0, n_broken_parts = 0;

void* allocate(std::size_t size) {
  auto buffer = std::make_unique<Guarded>(size);
  void* data = buffer->data();
  buffers.emplace(data, std::move(buffer));
  return data;
}

bool release(void* data) {
  const auto at = buffers.find(data);
  const bool intact = at->second->intact();
  buffers.erase(at);
  return intact;
}

void yield(State state, std::string place) {
  Fiber& fiber = fibers[current];
  fiber.state = state;
  fiber.place = std::move(place);
  if (_setjmp(fiber.resume) == 0) _longjmp(scheduler, 1);
}

void run_fiber() {
  try {
    (*body)();
  } catch (const std::exception& error) {
    fault = error.what();
  }
  fibers[current].state = State::kFinished;
  fibers[current].place = "the end";
  _longjmp(scheduler, 1);
}

void resume(unsigned t) {
  current = t;
  thread.x = t;
  Fiber& fiber = fibers[t];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

void on_fault(int signal, siginfo_t* info, void*) {
  if (!running) {
    std::signal(signal, SIG_DFL);
    return;
  }
  char address[32];
  std::snprintf(address, sizeof(address), "%p", info->si_addr);
  fault = std::string("access outside a buffer at ") + address;
  _longjmp(scheduler, 1);
}

std::string where(unsigned t) {
  return "thread " + std::to_string(t) + " at " + fibers[t].place;
}

// Lets threads [first, last) pass if all of them wait at one place; false where none waits or some
// do not.
bool release(unsigned first, unsigned last, State state) {
  for (unsigned t = first; t < last; ++t)
    if (fibers[t].state != state) return false;
  for (unsigned t = first; t < last; ++t) {
    if (fibers[t].place != fibers[first].place)
      throw std::runtime_error("threads wait at different barriers: " + where(first) + ", " +
                               where(t));
    fibers[t].state = State::kReady;
  }
  return true;
}

// Each warp runs as far as it can before the next one starts: the greatest skew that barriers
// allow.
void run_block(const std::vector<unsigned>& warps, const std::vector<unsigned>& lanes) {
  do {
    for (const unsigned warp : warps) {
      const unsigned first = warp * kWarpSize;
      do {
        for (const unsigned lane : lanes) {
          const unsigned t = first + lane;
          if (fibers[t].state == State::kReady) resume(t);
          if (!fault.empty())
            throw std::runtime_error(fault + " (block " + std::to_string(block.x) + ", thread " +
                                     std::to_string(t) + ")");
        }
      } while (release(first, first + kWarpSize, State::kAtWarpBarrier));
    }
  } while (release(0, n_threads, State::kAtBlockBarrier));
  for (unsigned t = 1; t < n_threads; ++t)
    if (fibers[t].place != fibers[0].place)
      throw std::runtime_error("a barrier is not reached by all threads: " + where(0) + ", " +
                               where(t));
}

std::vector<unsigned> permutation(unsigned n) {
  std::vector<unsigned> order(n);
  std::iota(order.begin(), order.end(), 0u);
  if (order_of_threads == 1) std::reverse(order.begin(), order.end());
  if (order_of_threads > 1)
    std::shuffle(order.begin(), order.end(), std::mt19937(order_of_threads));
  return order;
}

void start_block(unsigned index) {
  block.x = index;
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackSize;
    makecontext(&fiber.context, run_fiber, 0);
    fiber.started = false;
    fiber.state = State::kReady;
    fiber.parity = 0;
    fiber.copies.clear();
  }
}

}  // namespace

void launch(unsigned n_blocks, unsigned threads, std::size_t shared_size,
            const std::function<void()>& kernel) {
  if (threads % kWarpSize != 0) throw std::runtime_error("simt: whole warps only");
  ++n_launches;
  body = &kernel;
  n_threads = threads;
  fibers.resize(threads);
  const auto warps = permutation(threads / kWarpSize), lanes = permutation(kWarpSize);

  struct sigaction action{}, segv, bus;
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &segv);
  sigaction(SIGBUS, &action, &bus);
  fault.clear();
  running = true;
  std::string error;
  try {
    for (unsigned index = 0; index < n_blocks; ++index) {
      Guarded memory(std::max<std::size_t>((shared_size + 15) / 16 * 16, 16));
      shared = &memory;
      start_block(index);
      run_block(warps, lanes);
      if (!memory.intact()) throw std::runtime_error("a write below shared memory");
    }
  } catch (const std::exception& e) {
    error = e.what();
  }
  running = false;
  sigaction(SIGSEGV, &segv, nullptr);
  sigaction(SIGBUS, &bus, nullptr);
  if (!error.empty()) throw std::runtime_error("simt: " + error);
}

void block_barrier(int line) {
  ++barrier_lines[line];
  if (line != skipped_line)
    yield(State::kAtBlockBarrier, "the barrier of line " + std::to_string(line));
}

void warp_barrier(const char* operation) {
  yield(State::kAtWarpBarrier, operation);
}

bool any_of_block(bool vote) {
  fibers[current].vote = vote;
  yield(State::kAtBlockBarrier, "a vote");
  const bool any = std::any_of(fibers.begin(), fibers.end(), [](auto& f) { return f.vote; });
  yield(State::kAtBlockBarrier, "the end of a vote");
  return any;
}

void* allocate_part(const char* name, std::size_t size) {
  return allocate(size - (name == shortened_part ? std::min<std::size_t>(size, 8) : 0));
}

void release_part(void* part) {
  n_broken_parts += !release(part);
}

void copy_later(void* to, const void* from, std::size_t size) {
  fibers[current].copies.push_back({to, from, size});
}

void finish_copies(int line) {
  ++barrier_lines[line];
  if (line == skipped_line) return;
  for (const Copy& copy : fibers[current].copies) {
    if (copy.from == nullptr) {
      std::memset(copy.to, 0, copy.size);
    } else {
      std::memcpy(copy.to, copy.from, copy.size);
    }
  }
  fibers[current].copies.clear();
}

unsigned char* shared_bytes() {
  return shared->data();
}

const unsigned char* const* exchange(const void* value, std::size_t size, const char* operation) {
  Fiber& fiber = fibers[current];
  const int parity = fiber.parity;
  fiber.parity = 1 - parity;
  std::memcpy(fiber.slots[parity], value, size);
  warp_barrier(operation);
  static const unsigned char* lanes[kWarpSize];
  const unsigned first = current / kWarpSize * kWarpSize;
  for (unsigned lane = 0; lane < kWarpSize; ++lane)
    lanes[lane] = fibers[first + lane].slots[parity];
  return lanes;
}

}  // namespace simt

extern "C" {

// Order in which threads run: 0 ascending, 1 descending, else a seed; the line whose barrier or
// wait for copies is ignored, or −1.
void simt_configure(int order, int skipped_line) {
  simt::order_of_threads = order;
  simt::skipped_line = skipped_line;
  simt::barrier_lines.clear();
}

// Lines of the barriers and waits met since simt_configure; returns how many there are.
int simt_barrier_lines(int* lines, int capacity) {
  int n = 0;
  for (const auto& [line, count] : simt::barrier_lines)
    if (n < capacity) lines[n++] = line;
  return n;
}

// The part of scratch memory, by its name, that is 8 bytes short from here on; "" for none.
void simt_shorten(const char* name) {
  simt::shortened_part = name;
}

int simt_launches() {
  return simt::n_launches;
}

// Parts below which something was written.
int simt_broken_parts() {
  return simt::n_broken_parts;
}

void* simt_allocate(std::size_t size) {
  return simt::allocate(size);
}

// Returns 1 where nothing was written below the buffer.
int simt_release(void* data) {
  return simt::release(data);
}
}
