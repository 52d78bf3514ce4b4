// SPDX-License-Identifier: Apache-2.0
#include <dcp/media/local_lease.hpp>

#include <dcp/media/local_fs.hpp>

#include "../support/medium_conformance.hpp"
#include "../support/temporary_directory.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <csignal>
#include <string>
#include <thread>
#include <vector>

#include <sys/wait.h>

using namespace dcp;
using namespace dcp::test;

namespace {

void set_age(std::string const& path, std::chrono::seconds age) {
  timespec const then{std::time(nullptr) - age.count(), 0};
  timespec const times[] = {then, then};
  REQUIRE(::utimensat(AT_FDCWD, path.c_str(), times, 0) == 0);
}

/// A child process that runs `child` and then waits to be killed; the constructor returns once `child` is done.
class Child {
 public:
  template <class Body>
  explicit Child(Body child) {
    int ends[2];
    REQUIRE(::pipe(ends) == 0);
    id_ = ::fork();
    REQUIRE(id_ >= 0);
    if (id_ == 0) {
      char const done = child() ? 'y' : 'n';
      if (::write(ends[1], &done, 1) != 1) ::_exit(1);
      for (;;) ::pause();
    }
    ::close(ends[1]);
    REQUIRE(::read(ends[0], &answer_, 1) == 1);
    ::close(ends[0]);
  }
  ~Child() { kill(); }
  bool answer() const { return answer_ == 'y'; }
  void kill() {
    if (id_ <= 0) return;
    ::kill(id_, SIGKILL);
    ::waitpid(id_, nullptr, 0);
    id_ = -1;
  }

 private:
  pid_t id_ = -1;
  char answer_ = 0;
};

}  // namespace

TEST_CASE("lease: held by another process until that is killed") {
  TemporaryDirectory directory;
  LocalFs medium;
  std::unique_ptr<Lease> lease;
  Child child{[&] { return (lease = medium.acquire_lease(directory / "lease")) != nullptr; }};
  REQUIRE(child.answer());
  CHECK(medium.acquire_lease(directory / "lease") == nullptr);
  child.kill();
  CHECK(medium.acquire_lease(directory / "lease") != nullptr);
}

TEST_CASE("lease: a child that outlives its parent's object keeps nothing, and cannot release it") {
  TemporaryDirectory directory;
  LocalFs medium;
  auto lease = medium.acquire_lease(directory / "lease");
  REQUIRE(lease);
  Child child{[&] { return lease.reset(), true; }};   // the destructor runs in the child
  CHECK(medium.kind(directory / "lease") == EntryKind::file);
  CHECK(medium.acquire_lease(directory / "lease") == nullptr);
  Child sleeper{[&] { return true; }};                // holds a copy of the descriptor
  lease.reset();
  CHECK(medium.acquire_lease(directory / "lease") != nullptr);
}

TEST_CASE("lease: the file says who holds it") {
  TemporaryDirectory directory;
  LocalFs medium;
  auto const lease = medium.acquire_lease(directory / "lease");
  detail::LeaseHolder holder;
  REQUIRE(detail::LeaseHolder::parse(get(medium, directory / "lease"), holder));
  CHECK(holder.process == static_cast<long>(::getpid()));
  CHECK(holder.host == detail::LeaseHolder::self().host);
  CHECK(holder.boot == detail::LeaseHolder::self().boot);
}

TEST_CASE("lease: without a lock, a holder on another machine counts as alive while its file is young") {
  TemporaryDirectory directory;
  LocalFs medium;
  auto const path = directory / "lease";
  put(medium, path, "another-machine 12 another-boot\n");
  CHECK(medium.acquire_lease(path) == nullptr);
  set_age(path, std::chrono::minutes{14});
  CHECK(medium.acquire_lease(path) == nullptr);
  CHECK(get(medium, path) == "another-machine 12 another-boot\n");
  set_age(path, std::chrono::minutes{16});
  CHECK(medium.acquire_lease(path) != nullptr);

  put(medium, path, "another-machine 12 another-boot\n");
  set_age(path, -std::chrono::hours{24});   // a clock that is a day ahead does not hold it for a day
  CHECK(medium.acquire_lease(path) != nullptr);
}

TEST_CASE("lease: what a dead holder on this machine, a release or a crash left behind holds nothing") {
  TemporaryDirectory directory;
  LocalFs medium;
  auto const me = detail::LeaseHolder::self();
  for (auto const& text : {me.text(), me.host + " 12 another-boot\n", "another-name 12 " + me.boot + "\n", std::string{}, std::string{"torn"}}) {
    CAPTURE(text);
    put(medium, directory / "lease", text);
    CHECK(medium.acquire_lease(directory / "lease") != nullptr);
  }
}

TEST_CASE("lease: where locks do not work, age and the process table decide") {
  TemporaryDirectory directory;
  LocalFs medium;
  auto const path = directory / "lease";
  auto const alive = [&](detail::LeaseHolder const& holder, std::chrono::seconds age) {
    put(medium, path, holder.text());
    set_age(path, age);
    return detail::lease_is_alive(FileHandle::open_read(path), false);
  };
  auto me = detail::LeaseHolder::self();
  CHECK(alive(me, std::chrono::seconds{1}));
  CHECK_FALSE(alive(me, std::chrono::minutes{20}));
  auto rebooted = me;
  rebooted.boot = "before";
  CHECK_FALSE(alive(rebooted, std::chrono::seconds{1}));
  pid_t const gone = ::fork();
  if (gone == 0) ::_exit(0);
  REQUIRE(gone > 0);
  ::waitpid(gone, nullptr, 0);
  me.process = gone;
  CHECK_FALSE(alive(me, std::chrono::seconds{1}));
}

TEST_CASE("lease: while it is held it renews its sign of life, whatever its holder does, and no longer") {
  TemporaryDirectory directory;
  auto const path = directory / "lease";
  auto const age = [&] { return std::time(nullptr) - FileHandle::open_read(path).status().st_mtime; };
  auto const renewed = [&] {
    for (int wait = 0; wait < 2000 && age() > 3000; ++wait) std::this_thread::sleep_for(std::chrono::milliseconds{5});
    return age() < 3000;
  };
  {
    detail::LocalLease lease{FileHandle::open(path, O_RDWR | O_CREAT), std::chrono::milliseconds{5}};
    for (int beat = 0; beat < 3; ++beat) {
      set_age(path, std::chrono::hours{1});
      CHECK(renewed());
    }
    // A child shares the lease and ends without touching it.
    pid_t const child = ::fork();
    if (child == 0) {
      lease.~LocalLease();
      ::_exit(0);
    }
    REQUIRE(child > 0);
    int status = 0;
    ::waitpid(child, &status, 0);
    CHECK(status == 0);
    set_age(path, std::chrono::hours{1});
    CHECK(renewed());
  }
  CHECK_FALSE(std::filesystem::exists(path.c_str()));
}

TEST_CASE("lease: released after its directory was renamed, it leaves no sign of life") {
  TemporaryDirectory directory;
  LocalFs medium;
  medium.create_directory(directory / "attempt");
  auto lease = medium.acquire_lease(directory / "attempt/lease");
  REQUIRE(medium.publish_new(directory / "attempt", directory / "place"));
  lease.reset();
  CHECK(listing(medium, directory / "place") == "f lease 0\n");
}

TEST_CASE("lease: a link or a directory in its place is refused") {
  TemporaryDirectory directory;
  LocalFs medium;
  put(medium, directory / "precious", "do not cut");
  REQUIRE(::symlink("precious", (directory / "lease").c_str()) == 0);
  CHECK(error_of([&] { medium.acquire_lease(directory / "lease"); }).system_error() == ELOOP);
  CHECK(get(medium, directory / "precious") == "do not cut");
  medium.create_directory(directory / "d");
  CHECK(error_of([&] { medium.acquire_lease(directory / "d"); }).system_error() == EISDIR);
}

TEST_CASE("lease: never two holders while many take it and give it back") {
  TemporaryDirectory directory;
  std::atomic<int> holders = 0, most = 0, taken = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&] {
      LocalFs medium;
      for (int i = 0; i < 200; ++i) {
        auto const lease = medium.acquire_lease(directory / "lease");
        if (!lease) continue;
        int const now = ++holders;
        for (int seen = most; seen < now && !most.compare_exchange_weak(seen, now);) {
        }
        ++taken;
        std::this_thread::yield();
        --holders;
      }
    });
  for (auto& thread : threads) thread.join();
  CHECK(most == 1);
  CHECK(taken > 0);
}

TEST_CASE("lease: a lock on a file that has lost its name is no lease") {
  TemporaryDirectory directory;
  LocalFs medium;
  auto late = FileHandle::open(directory / "lease", O_RDWR | O_CREAT);   // opened while its holder was about to remove it
  medium.remove_file(directory / "lease");
  bool replaced = false;
  SUBCASE("gone") { CHECK(detail::take_lease(std::move(late), replaced) == nullptr); }
  SUBCASE("made anew") {
    auto const next = medium.acquire_lease(directory / "lease");
    CHECK(detail::take_lease(std::move(late), replaced) == nullptr);
    CHECK(next != nullptr);
  }
  CHECK(replaced);
}
