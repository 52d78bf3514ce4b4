// SPDX-License-Identifier: Apache-2.0
// script: more than 20
// error: our sentence
#ifdef MISTAKE
template <int N>
struct Flood {
  static_assert(N < 0, "our sentence");
};
template struct Flood<0>;
template struct Flood<1>;
template struct Flood<2>;
template struct Flood<3>;
template struct Flood<4>;
template struct Flood<5>;
template struct Flood<6>;
template struct Flood<7>;
#endif
int main() {}
