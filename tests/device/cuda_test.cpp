// SPDX-License-Identifier: Apache-2.0
// What of CUDA can be tested on a machine without a GPU, and is true on one with it. The devices themselves: tests/cuda.
#include <dcp/device/cuda.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <vector>

#include <dlfcn.h>

namespace {

static_assert(dcp::detail::StreamApi<dcp::detail::CudaApi>);

int static_memory = 1;
int const constant_memory = 1;

std::vector<std::shared_ptr<dcp::DeviceDriver>> cuda_drivers() {
  auto drivers = dcp::detail::DeviceDrivers<>::instance().all();
  std::erase_if(drivers, [](auto const& driver) { return driver->name() != "CUDA"; });
  return drivers;
}

/// 0 without a driver, too; `status` is what CUDA says then, and says to whatever it is asked.
int devices(cudaError_t* status = nullptr) {
  int count = 0;
  cudaError_t const answer = cudaGetDeviceCount(&count);
  static_cast<void>(cudaGetLastError());
  if (status != nullptr) *status = answer;
  return answer == cudaSuccess ? count : 0;
}

bool driver_is_loaded() { return ::dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD) != nullptr; }

}  // namespace

TEST_CASE("CUDA: the header adds its driver before main, once") {
  auto const drivers = cuda_drivers();
  REQUIRE(drivers.size() == 1);
  CHECK(drivers.front() == dcp::detail::cuda_driver());
  CHECK(drivers.front()->unpinned_bytes() == 0);
}

TEST_CASE("CUDA: memory of the host is the host's, and to ask does not load the driver") {
  auto const drivers = cuda_drivers();
  REQUIRE(drivers.size() == 1);
  dcp::DeviceDriver const& driver = *drivers.front();
  bool const loaded = driver_is_loaded();
  std::array<int, 4> on_the_stack{};
  std::vector<int> const on_the_heap(1 << 20);
  auto const page = std::make_unique<int>(1);
  for (void const* const address : std::array<void const*, 8>{on_the_stack.data(), on_the_heap.data(), on_the_heap.data() + on_the_heap.size() - 1, page.get(), &static_memory, &constant_memory, "text", nullptr}) {
    for (int again = 0; again < 2; ++again) {
      auto const place = driver.where(address);
      CHECK(place.kind == dcp::MemoryKind::host);
      CHECK(place.ordinal == -1);
    }
  }
  CHECK(driver_is_loaded() == loaded);
  if (devices() > 0) {
    CHECK(cudaPeekAtLastError() == cudaSuccess);
    for (void const* const address : std::array<void const*, 3>{on_the_stack.data(), on_the_heap.data(), &static_memory}) CHECK(driver.where(address).kind == dcp::MemoryKind::host);
    CHECK(cudaPeekAtLastError() == cudaSuccess);
  }
}

TEST_CASE("CUDA: dcp::on() names the driver, the device and the stream, and says in words that there is no device") {
  cudaError_t status = cudaSuccess;
  bool const some = devices(&status) > 0;
  for (cudaStream_t const stream : {static_cast<cudaStream_t>(nullptr), cudaStreamLegacy, cudaStreamPerThread}) {
    if (some) {
      auto const named = dcp::on(stream);
      CHECK(named.driver == dcp::detail::cuda_driver());
      CHECK(named.ordinal >= 0);
      CHECK(named.stream == static_cast<void*>(stream == nullptr ? cudaStreamLegacy : stream));
      continue;
    }
    bool thrown = false;
    try {
      static_cast<void>(dcp::on(stream));
    } catch (dcp::Error const& error) {
      thrown = true;
      CHECK(error.code() == dcp::ErrorCode::device);
      CHECK(error.message() == "CUDA refused to say which device a stream belongs to: " + std::string{cudaGetErrorName(status)} + ": " + cudaGetErrorString(status));
      CHECK(error.hint().find("nvidia-smi") != std::string::npos);
    }
    CHECK(thrown);
  }
}

TEST_CASE("CUDA: stream 0 is what it is in the file that names it") {
  CHECK(!dcp::detail::default_stream_is_per_thread_here);
  if (devices() > 0) {
    CHECK(dcp::on<true>(nullptr).stream == static_cast<void*>(cudaStreamPerThread));
    CHECK(dcp::on<false>(nullptr).stream == static_cast<void*>(cudaStreamLegacy));
  } else {
    CHECK_THROWS_AS(static_cast<void>(dcp::on<true>(nullptr)), dcp::Error);
  }
}

TEST_CASE("CUDA: where there is no device, nothing else is there either, and each refusal says what was refused") {
  cudaError_t status = cudaSuccess;
  bool const some = devices(&status) > 0;
  auto const driver = dcp::detail::cuda_driver();
  if (some) {
    CHECK_NOTHROW(static_cast<void>(driver->lane(0)));
    return;
  }
  auto const refused = [&](auto&& call) {
    try {
      call();
    } catch (dcp::Error const& error) {
      return error.code() == dcp::ErrorCode::device && error.message().starts_with("CUDA refused ") && error.message().find(cudaGetErrorName(status)) != std::string::npos;
    }
    return false;
  };
  CHECK(refused([&] { static_cast<void>(driver->lane(0)); }));
  CHECK(refused([&] { static_cast<void>(driver->record(0, nullptr)); }));
}
