# SPDX-License-Identifier: Apache-2.0
# The optional dependencies, one table for the build and for the installed package. A component is a header of its own, never included
# by another one, and target dcp::<component>. To add one: a name in the list, and its rows.
set(dcp_components mpi eigen uring s3 cuda nccl)
set(dcp_find_modules ${CMAKE_CURRENT_LIST_DIR})   # of packages that bring none

set(dcp_mpi_headers comm/mpi.hpp comm/mpi_gossip.hpp)
set(dcp_mpi_package MPI)
set(dcp_mpi_arguments COMPONENTS CXX)
set(dcp_mpi_target MPI::MPI_CXX)
set(dcp_mpi_debian libopenmpi-dev)

set(dcp_eigen_headers ext/eigen.hpp)
set(dcp_eigen_package Eigen3)
set(dcp_eigen_arguments 3.3)
set(dcp_eigen_target Eigen3::Eigen)
set(dcp_eigen_debian libeigen3-dev)

set(dcp_uring_headers io/uring.hpp media/uring_fs.hpp)
set(dcp_uring_package liburing)
set(dcp_uring_arguments "")
set(dcp_uring_target liburing::liburing)
set(dcp_uring_debian liburing-dev)

set(dcp_s3_headers io/s3_client.hpp media/object_store.hpp)
set(dcp_s3_package CURL)
set(dcp_s3_arguments "")
set(dcp_s3_target CURL::libcurl)
set(dcp_s3_debian libcurl4-openssl-dev)

set(dcp_cuda_headers device/cuda.hpp device/cuda_decoders.cuh)
set(dcp_cuda_package CUDAToolkit)
set(dcp_cuda_arguments "")
set(dcp_cuda_target CUDA::cudart)
set(dcp_cuda_libraries ${CMAKE_DL_LIBS})   # beside the target; nothing from glibc 2.34 on
set(dcp_cuda_debian nvidia-cuda-toolkit)

set(dcp_nccl_headers comm/nccl.hpp)
set(dcp_nccl_package NCCL)
set(dcp_nccl_arguments "")
set(dcp_nccl_target NCCL::nccl)   # brings CUDA::cudart
set(dcp_nccl_debian libnccl-dev)

# Looks for the dependency of a component: dcp_<component>_FOUND, and in words dcp_<component>_reason if it is not there.
# A macro, because find_package also sets variables that the caller's project uses (MPIEXEC_EXECUTABLE).
macro(dcp_find_component component)
  if(NOT TARGET ${dcp_${component}_target})
    list(APPEND CMAKE_MODULE_PATH ${dcp_find_modules})
    find_package(${dcp_${component}_package} ${dcp_${component}_arguments} QUIET)
    list(REMOVE_ITEM CMAKE_MODULE_PATH ${dcp_find_modules})
  endif()
  if(TARGET ${dcp_${component}_target})
    set(dcp_${component}_FOUND TRUE)
  else()
    set(dcp_${component}_FOUND FALSE)
    set(dcp_${component}_reason "component ${component} needs ${dcp_${component}_package}, which was not found (Debian: ${dcp_${component}_debian})")
  endif()
endmacro()
