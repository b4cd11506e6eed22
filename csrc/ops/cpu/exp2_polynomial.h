// 2^f on [-1/2, 1/2] as 1 + f (c1 + f (c2 + ...)): fitted to the least maximal relative error, 3e-9 with these fp32
// coefficients (each rounded before the next was fitted), under the condition that 2^0 is exactly 1.
#pragma once

namespace megatron_rlvr::vocab_logprob {

constexpr float kExp2C1 = 0x1.62e430p-1f;
constexpr float kExp2C2 = 0x1.ebfbdcp-3f;
constexpr float kExp2C3 = 0x1.c6af7cp-5f;
constexpr float kExp2C4 = 0x1.3b2de0p-7f;
constexpr float kExp2C5 = 0x1.5f082ep-10f;
constexpr float kExp2C6 = 0x1.416b5ep-13f;

// Below this exponent 2^y counts as zero: nothing in a sum of fp32 can feel it, and it is not a normal number.
constexpr float kExp2Lowest = -126.0f;

}  // namespace megatron_rlvr::vocab_logprob
