// SPDX-License-Identifier: Apache-2.0
#pragma once
// The version of the library. The version of what it writes stands in formats/commit_record.hpp and changes far less often.

#define DCP_VERSION_MAJOR 0
#define DCP_VERSION_MINOR 1
#define DCP_VERSION_PATCH 0

namespace dcp {

struct Version {
  int major, minor, patch;
};
inline constexpr Version version{DCP_VERSION_MAJOR, DCP_VERSION_MINOR, DCP_VERSION_PATCH};

}  // namespace dcp
