// A shared library that contains CompactAttention and must export nothing of it.
#include <compactattn.h>

extern "C" unsigned plugin_version() { return compactattn_version(); }
