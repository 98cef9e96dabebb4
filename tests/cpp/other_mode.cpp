// Always the other way of reporting than raii_test.cpp in the same program: the two must not share
// inline functions.
#include <compactattn.hpp>

bool other_mode_refuses_and_accepts();

#ifdef COMPACTATTN_NO_EXCEPTIONS
bool other_mode_refuses_and_accepts() {
  const auto refused = compactattn::Context::cpu(-1);
  return refused.status().code() == COMPACTATTN_E_VALUE && compactattn::Context::cpu(1).ok();
}
#else
bool other_mode_refuses_and_accepts() {
  try {
    const auto refused = compactattn::Context::cpu(-1);
    return false;
  } catch (const compactattn::Error& error) {
    return error.code() == COMPACTATTN_E_VALUE && compactattn::Context::cpu(1).get() != nullptr;
  }
}
#endif
