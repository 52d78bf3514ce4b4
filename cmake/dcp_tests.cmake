# SPDX-License-Identifier: Apache-2.0
# How dcp's own tests and examples are built: warnings are errors, sanitizers on request. Nothing here reaches a consumer.
set(DCP_SANITIZE "" CACHE STRING "Sanitizers for tests and examples: address;undefined or thread")
option(DCP_LONG "Campaigns run long: DCP_LONG=1 in the environment of tests, longer timeouts" OFF)
set(dcp_test_parts_all units mpi examples floors headers compile_fail packaging fuzz python)
set(DCP_TEST_PARTS "${dcp_test_parts_all}" CACHE STRING "Which parts of the tests to register; those from `floors` on look at sources, once is enough")
set(DCP_PYTHON "" CACHE FILEPATH "A Python with the packages of tests/python/requirements.txt; without it those tests are left out")

add_library(dcp_developer INTERFACE)
target_link_libraries(dcp_developer INTERFACE dcp)
target_compile_options(dcp_developer INTERFACE -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror)
if(DCP_SANITIZE)
  list(JOIN DCP_SANITIZE "," dcp_sanitize_option)
  target_compile_options(dcp_developer INTERFACE -fsanitize=${dcp_sanitize_option} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  target_link_options(dcp_developer INTERFACE -fsanitize=${dcp_sanitize_option})
endif()

set(dcp_mpi_runs FALSE)
if(TARGET dcp::mpi AND MPIEXEC_EXECUTABLE AND NOT "thread" IN_LIST DCP_SANITIZE)
  set(dcp_mpi_runs TRUE)
  execute_process(COMMAND ${MPIEXEC_EXECUTABLE} --version OUTPUT_VARIABLE version ERROR_VARIABLE version)
  set(dcp_mpiexec_flags "")
  if(version MATCHES "Open MPI|OpenRTE")
    set(dcp_mpiexec_flags --allow-run-as-root --oversubscribe)   # containers are root and small; other MPIs neither know nor need these
  endif()
endif()

# Says, at the end of tests/run.sh, that something of a part is not tested, and why.
function(dcp_not_run part what why)
  if(NOT part IN_LIST DCP_TEST_PARTS)
    return()
  endif()
  set_property(GLOBAL APPEND PROPERTY dcp_not_run "${what} (${why})")
  message(STATUS "dcp tests: not run: ${what} (${why})")
endfunction()

# dcp_add_test(name part seconds command...) with what every test has.
function(dcp_add_test name part seconds)
  if(NOT part IN_LIST dcp_test_parts_all)
    message(FATAL_ERROR "dcp_add_test: ${part} is no part")
  endif()
  if(NOT part IN_LIST DCP_TEST_PARTS)
    return()
  endif()
  set(environment "DCP_BUILD_DIR=${PROJECT_BINARY_DIR}" "DCP_SOURCE_DIR=${PROJECT_SOURCE_DIR}" "UBSAN_OPTIONS=print_stacktrace=1")
  if(DCP_LONG)
    list(APPEND environment "DCP_LONG=1")
    math(EXPR seconds "${seconds} * 20")
  endif()
  if(DCP_SANITIZE)
    math(EXPR seconds "${seconds} * 3")
  endif()
  add_test(NAME ${name} COMMAND ${ARGN})
  set_tests_properties(${name} PROPERTIES TIMEOUT ${seconds} LABELS ${part} ENVIRONMENT "${environment}")
endfunction()

# For a test that starts MPI, with or without a launcher. Open MPI leaks at exit, from plugins that it has unloaded by then (so there is
# no name to suppress it by); and in containers its copies through another process's memory are refused, loudly.
function(dcp_test_uses_mpi name)
  if(TEST ${name})
    set_property(TEST ${name} APPEND PROPERTY ENVIRONMENT "ASAN_OPTIONS=detect_leaks=0" "OMPI_MCA_btl_vader_single_copy_mechanism=none")
  endif()
endfunction()
