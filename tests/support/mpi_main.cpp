// SPDX-License-Identifier: Apache-2.0
// The main function of the tests in tests/mpi: every rank runs every case, rank 0 reports, other ranks only what fails there.
#define DOCTEST_CONFIG_IMPLEMENT
#define DOCTEST_CONFIG_NO_POSIX_SIGNALS   // when one rank fails, mpirun ends the others by a signal: that is no second failure
#include <doctest/doctest.h>
#include <mpi.h>

#include <chrono>
#include <iostream>
#include <sstream>
#include <string>
#include <thread>

namespace {

// A rank whose case failed is no longer in step with the others: ending the job beats waiting for their deadlines.
struct AbortOnFailure : doctest::IReporter {
  explicit AbortOnFailure(doctest::ContextOptions const&) {}
  void test_case_end(doctest::CurrentTestCaseStats const& stats) override {
    if (stats.failure_flags == 0) return;
    int rank = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    if (auto const* report = dynamic_cast<std::ostringstream*>(output)) std::cerr << "rank " << rank << ":\n" << report->str();
    std::cerr << std::flush;
    std::cout << std::flush;
    std::this_thread::sleep_for(std::chrono::milliseconds{500});   // other ranks that fail as well get to say so
    MPI_Abort(MPI_COMM_WORLD, 1);
  }
  void report_query(doctest::QueryData const&) override {}
  void test_run_start() override {}
  void test_run_end(doctest::TestRunStats const&) override {}
  void test_case_start(doctest::TestCaseData const&) override {}
  void test_case_reenter(doctest::TestCaseData const&) override {}
  void test_case_exception(doctest::TestCaseException const&) override {}
  void subcase_start(doctest::SubcaseSignature const&) override {}
  void subcase_end() override {}
  void log_assert(doctest::AssertData const&) override {}
  void log_message(doctest::MessageData const&) override {}
  void test_case_skipped(doctest::TestCaseData const&) override {}

  static inline std::ostream* output = nullptr;
};

// What failed is printed when it fails, before any reporter hears of the end of the case.
REGISTER_LISTENER("abort_on_failure", 1, AbortOnFailure);

}  // namespace

int main(int argc, char** argv) {
  int provided = 0, rank = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  doctest::Context context{argc, argv};
  context.setOption("no-colors", true);   // mpirun gives its ranks a terminal where there is none
  std::ostringstream quiet;
  if (rank != 0) {
    AbortOnFailure::output = &quiet;
    context.setCout(&quiet);
  }
  int const status = context.run();
  MPI_Finalize();
  return status;
}
