// operator new, counted. In a file of its own: inlined into its callers it trips
// -Wmismatched-new-delete.
#include <cstddef>
#include <cstdlib>
#include <new>

std::size_t allocations();

static std::size_t calls = 0;

std::size_t allocations() { return calls; }

void* operator new(std::size_t bytes) {
  ++calls;
  if (void* memory = std::malloc(bytes)) return memory;
  std::abort();
}

void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
