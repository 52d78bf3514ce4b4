// SPDX-License-Identifier: Apache-2.0
// script: the diagnostic does not say: a sentence with [brackets; and more]
// error: static
// error: a sentence with [brackets; and more]
#ifdef MISTAKE
static_assert(sizeof(int) == 1, "another sentence");
#endif
int main() {}
