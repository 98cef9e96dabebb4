// The CUDA driver, loaded by name: the program starts on machines without one, and building it
// takes no toolkit. Only what a small engine needs is declared.
#include <dlfcn.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "device.hpp"

namespace {

using Handle = void*;
using Address = std::uint64_t;
using Result = int;

// Symbols with a suffix are the current form of a function; its bare name is an older one.
struct Driver {
  Result (*init)(unsigned);
  Result (*name_of)(Result, const char**);
  Result (*retain)(Handle*, int);
  Result (*release)(int);
  Result (*set_current)(Handle);
  Result (*synchronize)();
  Result (*allocate)(Address*, std::size_t);
  Result (*free)(Address);
  Result (*allocate_host)(void**, std::size_t, unsigned);
  Result (*free_host)(void*);
  Result (*fill)(Address, unsigned char, std::size_t);
  Result (*to_device)(Address, const void*, std::size_t, Handle);
  Result (*to_host)(void*, Address, std::size_t, Handle);
  Result (*within)(Address, Address, std::size_t, Handle);
  Result (*stream_create)(Handle*, unsigned);
  Result (*stream_destroy)(Handle);
  Result (*stream_wait)(Handle, Handle, unsigned);
  Result (*event_create)(Handle*, unsigned);
  Result (*event_destroy)(Handle);
  Result (*event_record)(Handle, Handle);
  Result (*event_synchronize)(Handle);
  Result (*begin_capture)(Handle, int);
  Result (*end_capture)(Handle, Handle*);
  Result (*instantiate)(Handle*, Handle, unsigned long long);
  Result (*graph_destroy)(Handle);
  Result (*graph_launch)(Handle, Handle);
  Result (*exec_destroy)(Handle);
};

template <class Function>
void load(void* library, const char* symbol, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, symbol));
  if (function == nullptr) throw std::runtime_error(std::string("libcuda has no ") + symbol);
}

Driver load_driver() {
  // Never unloaded: the compactattn library holds on to it as well.
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error("no CUDA driver: libcuda.so.1 is not here");
  Driver cu{};
  load(library, "cuInit", cu.init);
  load(library, "cuGetErrorName", cu.name_of);
  load(library, "cuDevicePrimaryCtxRetain", cu.retain);
  load(library, "cuDevicePrimaryCtxRelease_v2", cu.release);
  load(library, "cuCtxSetCurrent", cu.set_current);
  load(library, "cuCtxSynchronize", cu.synchronize);
  load(library, "cuMemAlloc_v2", cu.allocate);
  load(library, "cuMemFree_v2", cu.free);
  load(library, "cuMemHostAlloc", cu.allocate_host);
  load(library, "cuMemFreeHost", cu.free_host);
  load(library, "cuMemsetD8_v2", cu.fill);
  load(library, "cuMemcpyHtoDAsync_v2", cu.to_device);
  load(library, "cuMemcpyDtoHAsync_v2", cu.to_host);
  load(library, "cuMemcpyDtoDAsync_v2", cu.within);
  load(library, "cuStreamCreate", cu.stream_create);
  load(library, "cuStreamDestroy_v2", cu.stream_destroy);
  load(library, "cuStreamWaitEvent", cu.stream_wait);
  load(library, "cuEventCreate", cu.event_create);
  load(library, "cuEventDestroy_v2", cu.event_destroy);
  load(library, "cuEventRecord", cu.event_record);
  load(library, "cuEventSynchronize", cu.event_synchronize);
  load(library, "cuStreamBeginCapture_v2", cu.begin_capture);
  load(library, "cuStreamEndCapture", cu.end_capture);
  load(library, "cuGraphInstantiateWithFlags", cu.instantiate);
  load(library, "cuGraphDestroy", cu.graph_destroy);
  load(library, "cuGraphLaunch", cu.graph_launch);
  load(library, "cuGraphExecDestroy", cu.exec_destroy);
  return cu;
}

Address address(const void* data) { return reinterpret_cast<Address>(data); }

class CudaDevice final : public Device {
 public:
  // The primary context, which the library takes too.
  explicit CudaDevice(int ordinal) : cu_(load_driver()), ordinal_(ordinal) {
    check(cu_.init(0), "cuInit");
    Handle primary = nullptr;
    check(cu_.retain(&primary, ordinal), "cuDevicePrimaryCtxRetain");
    try {
      check(cu_.set_current(primary), "cuCtxSetCurrent");
      for (Handle* stream : {&compute_, &uploads_}) {
        check(cu_.stream_create(stream, kNonBlocking), "cuStreamCreate");
      }
      for (Handle* event : {&uploaded_, &done_[0], &done_[1]}) {
        check(cu_.event_create(event, kNoTiming), "cuEventCreate");
      }
      context_ = std::make_unique<compactattn::Context>(compactattn::Context::cuda(ordinal));
    } catch (...) {
      close();
      throw;
    }
  }
  ~CudaDevice() override { close(); }
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  [[nodiscard]] const compactattn::Context& context() const override { return *context_; }

  void* allocate(std::size_t bytes) override {
    Address data = 0;
    check(cu_.allocate(&data, bytes), "cuMemAlloc");
    memory_.push_back(data);
    check(cu_.fill(data, 0xFF, bytes), "cuMemsetD8");
    // Filled on the default stream, which ours do not wait for.
    check(cu_.synchronize(), "cuCtxSynchronize");
    return reinterpret_cast<void*>(data);
  }
  void* allocate_host(std::size_t bytes) override {
    void* data = nullptr;
    check(cu_.allocate_host(&data, bytes, 0), "cuMemHostAlloc");
    host_memory_.push_back(data);
    return data;
  }

  void upload(void* to, const void* from, std::size_t bytes) override {
    check(cu_.to_device(address(to), from, bytes, uploads_), "cuMemcpyHtoDAsync");
  }
  void await_uploads() override {
    check(cu_.event_record(uploaded_, uploads_), "cuEventRecord");
    check(cu_.stream_wait(compute_, uploaded_, 0), "cuStreamWaitEvent");
  }
  void copy(void* to, const void* from, std::size_t bytes) override {
    check(cu_.within(address(to), address(from), bytes, compute_), "cuMemcpyDtoDAsync");
  }
  void download(void* to, const void* from, std::size_t bytes) override {
    check(cu_.to_host(to, address(from), bytes, compute_), "cuMemcpyDtoHAsync");
  }
  [[nodiscard]] void* stream() const override { return compute_; }

  void mark(int slot) override {
    check(cu_.event_record(done_[std::size_t(slot)], compute_), "cuEventRecord");
  }
  void wait(int slot) override {
    check(cu_.event_synchronize(done_[std::size_t(slot)]), "cuEventSynchronize");
  }

  void replay(int slot, const std::function<void()>& work) override {
    Handle& graph = graphs_[std::size_t(slot)];
    if (graph == nullptr) graph = record(work);
    check(cu_.graph_launch(graph, compute_), "cuGraphLaunch");
    ++replays_;
  }
  [[nodiscard]] int replays() const override { return replays_; }

 private:
  static constexpr unsigned kNonBlocking = 1;
  static constexpr unsigned kNoTiming = 2;
  static constexpr int kThreadLocal = 1;

  Handle record(const std::function<void()>& work) {
    check(cu_.begin_capture(compute_, kThreadLocal), "cuStreamBeginCapture");
    Handle graph = nullptr;
    try {
      work();
    } catch (...) {
      if (cu_.end_capture(compute_, &graph) == 0) cu_.graph_destroy(graph);
      throw;
    }
    check(cu_.end_capture(compute_, &graph), "cuStreamEndCapture");
    Handle exec = nullptr;
    const Result made = cu_.instantiate(&exec, graph, 0);
    cu_.graph_destroy(graph);
    check(made, "cuGraphInstantiate");
    return exec;
  }

  // What fails here fails because an earlier call did, which has been reported.
  void close() noexcept {
    cu_.synchronize();
    context_.reset();
    for (Handle graph : graphs_) {
      if (graph != nullptr) cu_.exec_destroy(graph);
    }
    for (Handle event : {uploaded_, done_[0], done_[1]}) {
      if (event != nullptr) cu_.event_destroy(event);
    }
    for (Handle stream : {compute_, uploads_}) {
      if (stream != nullptr) cu_.stream_destroy(stream);
    }
    for (const Address data : memory_) cu_.free(data);
    for (void* data : host_memory_) cu_.free_host(data);
    cu_.release(ordinal_);
  }

  void check(Result result, const char* call) const {
    if (result == 0) return;
    const char* name = nullptr;
    if (cu_.name_of(result, &name) != 0) name = "unknown error";
    throw std::runtime_error(std::string(call) + ": " + name);
  }

  Driver cu_;
  int ordinal_;
  Handle compute_ = nullptr;
  Handle uploads_ = nullptr;
  Handle uploaded_ = nullptr;
  std::array<Handle, 2> done_{};
  std::array<Handle, 2> graphs_{};
  std::unique_ptr<compactattn::Context> context_;
  std::vector<Address> memory_;
  std::vector<void*> host_memory_;
  int replays_ = 0;
};

}  // namespace

std::unique_ptr<Device> make_cuda_device(int ordinal) {
  return std::make_unique<CudaDevice>(ordinal);
}
