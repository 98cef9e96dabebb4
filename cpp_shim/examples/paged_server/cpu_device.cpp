#include <cstring>
#include <vector>

#include "device.hpp"

namespace {

// Everything is done by the time a call returns.
class CpuDevice final : public Device {
 public:
  [[nodiscard]] const compactattn::Context& context() const override { return context_; }

  void* allocate(std::size_t bytes) override {
    void* data = ::operator new(bytes, kAlignment);
    memory_.emplace_back(data);
    return std::memset(data, 0xFF, bytes);
  }
  void* allocate_host(std::size_t bytes) override { return allocate(bytes); }

  void upload(void* to, const void* from, std::size_t bytes) override {
    std::memcpy(to, from, bytes);
  }
  void copy(void* to, const void* from, std::size_t bytes) override {
    std::memcpy(to, from, bytes);
  }
  void download(void* to, const void* from, std::size_t bytes) override {
    std::memcpy(to, from, bytes);
  }
  void await_uploads() override {}
  [[nodiscard]] void* stream() const override { return nullptr; }
  void mark(int) override {}
  void wait(int) override {}
  void replay(int, const std::function<void()>& work) override { work(); }
  [[nodiscard]] int replays() const override { return 0; }

 private:
  static constexpr std::align_val_t kAlignment{256};

  struct Free {
    void operator()(void* data) const { ::operator delete(data, kAlignment); }
  };

  compactattn::Context context_ = compactattn::Context::cpu();
  std::vector<std::unique_ptr<void, Free>> memory_;
};

}  // namespace

std::unique_ptr<Device> make_cpu_device() { return std::make_unique<CpuDevice>(); }
