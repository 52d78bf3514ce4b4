# SPDX-License-Identifier: Apache-2.0
# nlohmann_json: the target the project already has, else the installed package, else the release, pinned by its hash.
if(NOT TARGET nlohmann_json::nlohmann_json)
  find_package(nlohmann_json 3.11 QUIET)
endif()
if(NOT TARGET nlohmann_json::nlohmann_json)
  message(STATUS "dcp: nlohmann_json >= 3.11 is not installed (Debian: nlohmann-json3-dev); fetching release 3.11.3")
  include(FetchContent)
  if(DCP_INSTALL)
    set(JSON_Install ON CACHE INTERNAL "")   # what dcp's package refers to must be installed with it
  endif()
  FetchContent_Declare(nlohmann_json
    URL https://github.com/nlohmann/json/releases/download/v3.11.3/json.tar.xz
    URL_HASH SHA256=d6c65aca6b1ed68e7a182f4757257b107ae403032760ed6ef121c9d55e81757d)
  FetchContent_MakeAvailable(nlohmann_json)
endif()
if(NOT TARGET nlohmann_json::nlohmann_json)
  message(FATAL_ERROR "dcp: nlohmann_json >= 3.11 was not found and what was fetched in its place defines no target "
                      "nlohmann_json::nlohmann_json; install it (Debian: nlohmann-json3-dev)")
endif()
