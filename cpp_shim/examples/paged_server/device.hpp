// Memory and streams of the device that serves. All memory of a Device goes with it.
#pragma once

#include <compactattn.hpp>
#include <cstddef>
#include <functional>
#include <memory>

class Device {
 public:
  virtual ~Device() = default;

  [[nodiscard]] virtual const compactattn::Context& context() const = 0;

  // Bytes of 0xFF, which are NaN in every float type and -1 in every integer: what reads unwritten
  // memory shows.
  virtual void* allocate(std::size_t bytes) = 0;

  // Host memory that uploads and downloads need not copy first.
  virtual void* allocate_host(std::size_t bytes) = 0;

  // On the upload stream.
  virtual void upload(void* to, const void* from, std::size_t bytes) = 0;

  // Work submitted from here on starts after what was uploaded so far.
  virtual void await_uploads() = 0;

  // The rest is on the compute stream, in order.
  virtual void copy(void* to, const void* from, std::size_t bytes) = 0;
  virtual void download(void* to, const void* from, std::size_t bytes) = 0;
  [[nodiscard]] virtual void* stream() const = 0;

  // Marks the end of what a slot (0 or 1) has submitted; and waits, on the host, for that mark.
  virtual void mark(int slot) = 0;
  virtual void wait(int slot) = 0;

  // `work` as a graph of the slot: recorded by the first call, launched by every one. Where there
  // are no graphs it just runs.
  virtual void replay(int slot, const std::function<void()>& work) = 0;
  [[nodiscard]] virtual int replays() const = 0;
};

std::unique_ptr<Device> make_cpu_device();

// GPU `ordinal`; throws std::runtime_error if there is no driver or no such GPU.
std::unique_ptr<Device> make_cuda_device(int ordinal);
