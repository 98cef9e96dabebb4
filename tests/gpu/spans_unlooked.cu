// plan's spans without the look through the block tables, for timing only (time_check.py).
#include "../../cuda/common/spans.cuh"
// What spans.cu asks for a request's pages.
#define pieces_of_log2(tokens, log2) 0
#include "../../cuda/plan/spans.cu"
