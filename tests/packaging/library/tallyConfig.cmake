# SPDX-License-Identifier: Apache-2.0
include(CMakeFindDependencyMacro)
find_dependency(dcp)
include("${CMAKE_CURRENT_LIST_DIR}/tally_targets.cmake")
