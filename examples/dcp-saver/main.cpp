// SPDX-License-Identifier: Apache-2.0
// dcp-saver: finishes saves in the background of a program that was killed. Programs that save with dcp::Executor::process start it by themselves;
// started by hand it does nothing.
#include <dcp/checkpoint/saver_service.hpp>

#include <cstdio>

int main(int argc, char** argv) {
  int const status = dcp::run_saver(argc, argv);
  if (status != 0) std::fputs("dcp-saver is started by programs that save with dcp::Executor::process, not by hand\n", stderr);
  return status;
}
