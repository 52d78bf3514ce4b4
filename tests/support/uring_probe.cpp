// SPDX-License-Identifier: Apache-2.0
// Whether this process may have an io_uring: run while CMake configures.
#include <liburing.h>

int main() {
  io_uring ring;
  if (io_uring_queue_init(2, &ring, 0) != 0) return 1;
  io_uring_queue_exit(&ring);
  return 0;
}
