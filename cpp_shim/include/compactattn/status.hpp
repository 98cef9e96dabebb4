// How calls end: Status, and Error or Result. Part of compactattn.hpp.
#pragma once

#include <compactattn.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <utility>

#if !defined(COMPACTATTN_NO_EXCEPTIONS) && !defined(__cpp_exceptions)
#define COMPACTATTN_NO_EXCEPTIONS 1
#endif
// What reports differently has another name in each mode: objects built either way link together.
#ifdef COMPACTATTN_NO_EXCEPTIONS
#define COMPACTATTN_REPORTING reporting
#else
#define COMPACTATTN_REPORTING throwing
#include <stdexcept>
#endif

namespace compactattn {

// How a call ended, with the library's sentence on it (argument, wanted, got) if it failed.
class [[nodiscard]] Status {
 public:
  Status() = default;

  // Takes this thread's last message along, so that later calls do not change it.
  explicit Status(compactattn_status code) : code_(code) {
    if (ok()) return;
    char text[512];
    compactattn_last_error(text, sizeof text);
    message_ = text;
  }

  Status(compactattn_status code, std::string message)
      : code_(code), message_(std::move(message)) {}

  [[nodiscard]] bool ok() const noexcept { return code_ == COMPACTATTN_OK; }
  [[nodiscard]] compactattn_status code() const noexcept { return code_; }
  // "E_SHAPE", ...
  [[nodiscard]] const char* name() const noexcept { return compactattn_status_string(code_); }
  [[nodiscard]] const std::string& message() const noexcept { return message_; }

 private:
  compactattn_status code_ = COMPACTATTN_OK;
  std::string message_;
};

inline namespace COMPACTATTN_REPORTING {

#ifdef COMPACTATTN_NO_EXCEPTIONS

// A value, or why there is none.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}
  Result(Status status) : status_(std::move(status)) {}

  [[nodiscard]] bool ok() const noexcept { return value_.has_value(); }
  [[nodiscard]] const Status& status() const noexcept { return status_; }

  // The value; the program ends here if there is none.
  [[nodiscard]] T& value() & { return ok() ? *value_ : (std::abort(), *value_); }
  [[nodiscard]] T&& value() && { return std::move(value()); }

 private:
  std::optional<T> value_;
  Status status_;
};

template <class T>
using Returned = Result<T>;
using Done = Status;

namespace detail {
inline Done done(Status status) { return status; }
template <class T>
Returned<T> done(Status status, T value) {
  if (!status.ok()) return status;
  return Returned<T>(std::move(value));
}
}  // namespace detail
#else

// What failing calls throw; what() is the library's sentence.
class Error : public std::runtime_error {
 public:
  explicit Error(const Status& status)
      : std::runtime_error(status.message()), code_(status.code()) {}
  [[nodiscard]] compactattn_status code() const noexcept { return code_; }

 private:
  compactattn_status code_;
};

template <class T>
using Returned = T;
using Done = void;

namespace detail {
inline void done(const Status& status) {
  if (!status.ok()) throw Error(status);
}
template <class T>
T done(const Status& status, T value) {
  done(status);
  return value;
}
}  // namespace detail
#endif

}  // namespace COMPACTATTN_REPORTING
}  // namespace compactattn
