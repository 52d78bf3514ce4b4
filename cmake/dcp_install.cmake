# SPDX-License-Identifier: Apache-2.0
# Install rules and the package: find_package(dcp [COMPONENTS ...]) from the install tree, wherever it was moved, or from the build tree.
# Everything but the program dcp-saver goes below share/, as nothing in it depends on the architecture.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(dcp_package_dir ${CMAKE_INSTALL_DATADIR}/cmake/dcp)
foreach(name IN ITEMS dcp ${dcp_components})
  set(target dcp_${name})
  if(name STREQUAL "dcp")
    set(target dcp)
  endif()
  # A component has an export of its own: its targets file is read only when the component was asked for.
  if(CMAKE_VERSION VERSION_GREATER_EQUAL 3.23)
    install(TARGETS ${target} EXPORT dcp_${name}_targets FILE_SET HEADERS DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
  else()
    install(TARGETS ${target} EXPORT dcp_${name}_targets INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
  endif()
  install(EXPORT dcp_${name}_targets NAMESPACE dcp:: FILE ${target}_targets.cmake DESTINATION ${dcp_package_dir})
  export(EXPORT dcp_${name}_targets NAMESPACE dcp:: FILE ${PROJECT_BINARY_DIR}/${target}_targets.cmake)
endforeach()
if(TARGET dcp_saver)
  install(TARGETS dcp_saver_program RUNTIME DESTINATION bin)
  install(TARGETS dcp_saver EXPORT dcp_saver_targets)
  install(EXPORT dcp_saver_targets NAMESPACE dcp:: FILE dcp_saver_targets.cmake DESTINATION ${dcp_package_dir})
  export(EXPORT dcp_saver_targets NAMESPACE dcp:: FILE ${PROJECT_BINARY_DIR}/dcp_saver_targets.cmake)
endif()
if(CMAKE_VERSION VERSION_LESS 3.23)
  install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/dcp DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN *.hpp PATTERN *.cuh)
endif()

configure_package_config_file(cmake/dcpConfig.cmake.in ${PROJECT_BINARY_DIR}/dcpConfig.cmake INSTALL_DESTINATION ${dcp_package_dir}
                              NO_SET_AND_CHECK_MACRO)
# Before 1.0 a minor version may change the interface.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/dcpConfigVersion.cmake COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
configure_file(cmake/dcp_components.cmake ${PROJECT_BINARY_DIR}/dcp_components.cmake COPYONLY)
foreach(name IN ITEMS Findliburing.cmake FindNCCL.cmake)
  configure_file(cmake/${name} ${PROJECT_BINARY_DIR}/${name} COPYONLY)
  install(FILES cmake/${name} DESTINATION ${dcp_package_dir})
endforeach()
install(FILES ${PROJECT_BINARY_DIR}/dcpConfig.cmake ${PROJECT_BINARY_DIR}/dcpConfigVersion.cmake cmake/dcp_components.cmake
        DESTINATION ${dcp_package_dir})
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})
