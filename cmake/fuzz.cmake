# SPDX-License-Identifier: Apache-2.0
# cmake -DSOURCE=<tests/fuzz/x_fuzz.cpp> -DWORK=<folder> -DSECONDS=10 -DCOMPILER=clang++ [-DLAUNCHER=ccache] [-DINCLUDES=a,b] -P fuzz.cmake
#
# Compiles LLVMFuzzerTestOneInput with libFuzzer and the address and undefined-behaviour sanitizers, and runs it for SECONDS.
#   WORK/corpus                what earlier runs found worth keeping; it grows
#   <source>/corpus/<x>/       seeds, if that folder is there
#   // fuzz: -max_len=4096     further options of libFuzzer, in the source
# An input that fails stays in WORK, and its path is printed.
cmake_minimum_required(VERSION 3.22)
get_filename_component(root ${CMAKE_CURRENT_LIST_DIR}/.. ABSOLUTE)
get_filename_component(folder ${SOURCE} DIRECTORY)
get_filename_component(name ${SOURCE} NAME_WE)
string(REGEX REPLACE "_fuzz$" "" name ${name})
string(REPLACE "," ";" INCLUDES "${INCLUDES}")
list(TRANSFORM INCLUDES REPLACE "(.+)" "-isystem;\\1")
file(MAKE_DIRECTORY ${WORK}/corpus)

set(sanitize -fsanitize=fuzzer,address,undefined)
execute_process(COMMAND ${LAUNCHER} ${COMPILER} -std=c++20 -O1 -g ${sanitize} -fno-sanitize-recover=all -I${root}/include -I${root}/tests
                        ${INCLUDES} "-DDCP_TESTS_DIR=\"${root}/tests\"" -c ${SOURCE} -o ${WORK}/fuzz.o
                COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND ${COMPILER} ${sanitize} ${WORK}/fuzz.o -pthread -o ${WORK}/fuzz COMMAND_ERROR_IS_FATAL ANY)

file(STRINGS ${SOURCE} options REGEX "^// fuzz: " LIMIT_COUNT 1)
string(REPLACE "// fuzz: " "" options "${options}")
separate_arguments(options UNIX_COMMAND "${options}")
set(seeds "")
if(IS_DIRECTORY ${folder}/corpus/${name})
  set(seeds ${folder}/corpus/${name})
endif()
execute_process(COMMAND ${WORK}/fuzz -max_total_time=${SECONDS} -timeout=10 -print_final_stats=1 -verbosity=0 -artifact_prefix=${WORK}/ ${options}
                        ${WORK}/corpus ${seeds}
                RESULT_VARIABLE status)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "fuzz ${name}: an input fails; it lies in ${WORK}")
endif()
message(STATUS "fuzz ${name}: ${SECONDS} s, nothing found")
