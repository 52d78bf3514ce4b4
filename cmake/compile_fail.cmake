# SPDX-License-Identifier: Apache-2.0
# cmake -DCOMPILER=<g++|clang++|nvcc> [-DCASES=<folder or file>] [-DJOBS=2] -P compile_fail.cmake
#
# A case is one file with both halves. As it stands it compiles; with -DMISTAKE it does not, and what the compiler prints holds each of
# the file's sentences, literally, in at most 20 lines:
#   // error: dcp: a tensor with Partial axes has no value to save
#   // error (clang): due to requirement            for one compiler only (gcc, clang, nvcc), where the words are the compiler's own
# The first half proves that the rest of the file is sound, the sentence that the failure is ours, the line count that a user can read it.
# There is no build tree: the compiler only checks.
#
# -DSELF_TEST=ON   the cases are wrong, each in one way; this script must find what the file's "// script: <text>" says.
cmake_minimum_required(VERSION 3.22)
set(most_lines 20)
set(ENV{LC_ALL} C)   # the compilers' own words, in English and with plain quotes
get_filename_component(root ${CMAKE_CURRENT_LIST_DIR}/.. ABSOLUTE)
if(NOT CASES)
  set(CASES ${root}/tests/compile_fail)
endif()
if(NOT JOBS)
  set(JOBS 2)
endif()

# What follows `marker` in lines of `text`, each with the result of calling `visit`. By hand, since sentences hold [, ] and ;.
macro(for_each_line_with marker text visit)
  set(rest "${text}\n")
  string(FIND "${rest}" "${marker}" at)
  while(NOT at EQUAL -1)
    string(LENGTH "${marker}" length)
    math(EXPR at "${at} + ${length}")
    string(SUBSTRING "${rest}" ${at} -1 rest)
    string(FIND "${rest}" "\n" end)
    string(SUBSTRING "${rest}" 0 ${end} value)
    string(STRIP "${value}" value)
    cmake_language(CALL ${visit})
    string(FIND "${rest}" "${marker}" at)
  endwhile()
endmacro()

if(NOT IS_DIRECTORY ${CASES})   # one case
  get_filename_component(name ${CASES} NAME_WE)
  file(READ ${CASES} text)
  if(COMPILER MATCHES "nvcc")
    # Nothing else of nvcc stops after its front end; this one reads host code as well, templates included.
    set(kind nvcc)
    string(RANDOM LENGTH 12 id)
    set(output /tmp/dcp_compile_fail_${id}.ptx)   # not /dev/null: root's nvcc could remove it
    set(command ${COMPILER} -x cu -std=c++20 --ptx -o ${output})
  else()
    set(output "")
    set(kind gcc)
    if(COMPILER MATCHES "clang")
      set(kind clang)
    endif()
    set(command ${COMPILER} -std=c++20 -fsyntax-only)
  endif()
  list(APPEND command -I${root}/include)

  set(faults "")
  set(sentences 0)
  macro(check_sentence)
    math(EXPR sentences "${sentences} + 1")
    string(FIND "${diagnostic}" "${value}" found)
    if(found EQUAL -1)
      string(APPEND faults "  the diagnostic does not say: ${value}\n")
    endif()
  endmacro()

  execute_process(COMMAND ${command} ${CASES} RESULT_VARIABLE status OUTPUT_QUIET ERROR_VARIABLE diagnostic)
  if(NOT status EQUAL 0)
    string(APPEND faults "  it does not compile without the mistake:\n${diagnostic}\n")
  endif()
  execute_process(COMMAND ${command} -DMISTAKE ${CASES} RESULT_VARIABLE status OUTPUT_QUIET ERROR_VARIABLE diagnostic)
  file(REMOVE ${output})
  string(REGEX REPLACE "[^\n]" "" lines "${diagnostic}")
  string(LENGTH "${lines}" lines)
  if(status EQUAL 0)
    string(APPEND faults "  it compiles with the mistake\n")
  else()
    for_each_line_with("// error: " "${text}" check_sentence)
    for_each_line_with("// error (${kind}): " "${text}" check_sentence)
    if(sentences EQUAL 0)
      string(APPEND faults "  no line '// error: <text>' says what ${kind} should print\n")
    endif()
    if(lines GREATER most_lines)
      string(APPEND faults "  the diagnostic has ${lines} lines, more than ${most_lines}\n")
    endif()
    if(faults)
      string(APPEND faults "what ${COMPILER} printed with the mistake:\n${diagnostic}\n")
    endif()
  endif()
  if(faults)
    message(NOTICE "compile_fail ${kind} ${name}:\n${faults}")   # NOTICE does not wrap what the compiler said
    message(FATAL_ERROR "compile_fail ${kind} ${name}: not as it should be")
  endif()
  message(STATUS "compile_fail ${kind} ${name}: ${lines} lines")
  return()
endif()

file(GLOB cases ${CASES}/*.cpp)
list(LENGTH cases count)
if(count EQUAL 0)
  message(FATAL_ERROR "no cases in ${CASES}")
endif()

if(SELF_TEST)
  macro(expect_value)
    set(expected "${value}")
  endmacro()
  foreach(case IN LISTS cases)
    file(READ ${case} text)
    set(expected "")
    for_each_line_with("// script: " "${text}" expect_value)
    execute_process(COMMAND ${CMAKE_COMMAND} -DCOMPILER=${COMPILER} -DCASES=${case} -P ${CMAKE_CURRENT_LIST_FILE}
                    RESULT_VARIABLE status OUTPUT_VARIABLE out ERROR_VARIABLE out)
    string(FIND "${out}" "${expected}" at)
    if(status EQUAL 0 OR at EQUAL -1 OR expected STREQUAL "")
      message(SEND_ERROR "self-test ${case}: expected a failure that says '${expected}'; got status ${status}:\n${out}")
    endif()
  endforeach()
  message(STATUS "compile_fail: the script finds ${count} kinds of wrong case")
  return()
endif()

list(JOIN cases "\n" list)
string(RANDOM LENGTH 12 id)
set(list_file /tmp/dcp_compile_fail_${id})
file(WRITE ${list_file} "${list}\n")
execute_process(COMMAND xargs -a ${list_file} -d "\n" -P ${JOBS} -I{} ${CMAKE_COMMAND} -DCOMPILER=${COMPILER} -DCASES={} -P ${CMAKE_CURRENT_LIST_FILE}
                RESULT_VARIABLE status)
file(REMOVE ${list_file})
if(NOT status EQUAL 0)
  message(FATAL_ERROR "compile_fail ${COMPILER}: not all of ${count} cases are as they should be")
endif()
message(STATUS "compile_fail ${COMPILER}: ${count} cases")
