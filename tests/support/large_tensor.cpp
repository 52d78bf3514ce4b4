// SPDX-License-Identifier: Apache-2.0
// A logical tensor of 64 GiB, saved, loaded and resharded by ranks that own a row of it: run under a limit of address space (ulimit -v)
// that is a fraction of a percent of it. Every row is the same, in memory by a stride of 0 and in files by a medium that keeps only
// what differs from that, but checks every byte that it is given.
#include <dcp/dcp.hpp>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr std::int64_t rows = 65'536, columns = 262'144;   // of 4 bytes: 2^34 elements in 2^36 bytes
constexpr std::uint64_t row_bytes = 4 * columns, header_bytes = 4096, file_bytes = header_bytes + row_bytes * rows;

// Row r of the file, as memory.
std::vector<float> const& row() {
  static std::vector<float> const values = [] {
    std::vector<float> v(columns);
    for (std::size_t i = 0; i < v.size(); ++i) v[i] = static_cast<float>(i * 7 % 262'139);
    return v;
  }();
  return values;
}

// Calls visit(bytes of the row, where they are in a range of the file, their number) for the whole range, which begins behind the header.
template <class Visit>
void for_each_part(std::uint64_t position, std::uint64_t size, Visit visit) {
  auto const* bytes = reinterpret_cast<std::byte const*>(row().data());
  for (std::uint64_t done = 0; done < size;) {
    std::uint64_t const at = (position + done - header_bytes) % row_bytes, part = std::min(size - done, row_bytes - at);
    visit(bytes + at, done, static_cast<std::size_t>(part));
    done += part;
  }
}

bool is_data(std::string const& path) { return path.ends_with(".safetensors"); }

class PeriodicWrites final : public dcp::WritableFile {
 public:
  explicit PeriodicWrites(std::unique_ptr<dcp::WritableFile> header) : header_{std::move(header)} {}
  void write_at(std::uint64_t offset, dcp::ConstByteSpan bytes) override {
    if (offset < header_bytes) {
      auto const part = static_cast<std::size_t>(std::min<std::uint64_t>(bytes.size(), header_bytes - offset));
      header_->write_at(offset, bytes.first(part));
      offset += part;
      bytes = bytes.subspan(part);
    }
    if (offset + bytes.size() > file_bytes) throw std::runtime_error("a write beyond the file");
    for_each_part(offset, bytes.size(), [&](std::byte const* wanted, std::uint64_t at, std::size_t size) {
      if (std::memcmp(wanted, bytes.data() + at, size) != 0) throw std::runtime_error("wrong bytes were written near " + std::to_string(offset + at));
    });
  }
  void resize(std::uint64_t size) override {
    if (size != file_bytes) throw std::runtime_error("the file is to have " + std::to_string(size) + " bytes");
    header_->resize(header_bytes);
  }
  void sync() override { header_->sync(); }
  void close() override { header_->close(); }

 private:
  std::unique_ptr<dcp::WritableFile> header_;
};

class PeriodicReads final : public dcp::ReadableFile {
 public:
  explicit PeriodicReads(std::unique_ptr<dcp::ReadableFile> header) : header_{std::move(header)} {}
  std::uint64_t size() const override { return file_bytes; }
  void read_at(std::uint64_t offset, dcp::ByteSpan out) override {
    if (offset < header_bytes) {
      auto const part = static_cast<std::size_t>(std::min<std::uint64_t>(out.size(), header_bytes - offset));
      header_->read_at(offset, out.first(part));
      offset += part;
      out = out.subspan(part);
    }
    for_each_part(offset, out.size(), [&](std::byte const* bytes, std::uint64_t at, std::size_t size) { std::memcpy(out.data() + at, bytes, size); });
  }

 private:
  std::unique_ptr<dcp::ReadableFile> header_;
};

class Periodic : public dcp::Memory {
 public:
  template <class = dcp::Deferred>
  std::unique_ptr<dcp::WritableFile> open_write(std::string const& path) {
    auto file = dcp::Memory::open_write(path);
    if (!is_data(path)) return file;
    return std::make_unique<PeriodicWrites>(std::move(file));
  }
  template <class = dcp::Deferred>
  std::unique_ptr<dcp::ReadableFile> open_read(std::string const& path) {
    auto file = dcp::Memory::open_read(path);
    if (!is_data(path)) return file;
    return std::make_unique<PeriodicReads>(std::move(file));
  }
};

using Storage = dcp::BasicSafeTensors<Periodic>;
using Rows = dcp::Placement<dcp::Shard<0>>;
using Columns = dcp::Placement<dcp::Shard<1>>;
constexpr std::uint64_t budget = 16 << 20;

template <class P>
struct Slice {
  dcp::DeviceMesh<1> mesh;
  dcp::Box box;
  std::vector<float> memory;
  dcp::ShardedTensor<float, P> tensor;

  explicit Slice(dcp::ThreadComm const& world)
      : mesh{world, {world.size()}},
        box{dcp::local_box<P>(mesh, {rows, columns})},
        memory(static_cast<std::size_t>(box.shape[1])),
        tensor{mesh, dcp::Extents{rows, columns}, dcp::TensorView<float>{memory, box.shape, {0, 1}}} {}
  Slice(Slice const&) = delete;
  dcp::StateDict state() { return {{"w", tensor}}; }
  void fill() { std::memcpy(memory.data(), row().data() + box.origin[1], 4 * memory.size()); }
  void check(char const* after) {
    if (std::memcmp(memory.data(), row().data() + box.origin[1], 4 * memory.size()) != 0) throw std::runtime_error(std::string{"wrong values after "} + after);
    std::fill(memory.begin(), memory.end(), -1.0f);
  }
};

}  // namespace

int main() try {
  Periodic const store;
  auto begin = std::chrono::steady_clock::now();
  auto const done = [&](std::string const& what) {
    auto const now = std::chrono::steady_clock::now();
    std::cout << what << ": " << std::chrono::duration<double>(now - begin).count() << " s\n" << std::flush;
    begin = now;
  };
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    Slice<Rows> slice{world};
    slice.fill();
    dcp::SaveOptions<Storage> options;
    options.threads = 1;
    options.memory_bytes = budget;
    auto const report = dcp::save<Storage>(world, {store, "ckpt"}, slice.state(), options);
    if (report.tensor_bytes != row_bytes * rows) throw std::runtime_error("the report counts wrongly");
  });
  done("saved");
  auto const load = [&]<class P>(P, char const* what) {
    dcp::run_threads(2, [&](dcp::ThreadComm& world) {
      Slice<P> slice{world};
      dcp::LoadOptions<Storage> options;
      options.threads = 1;
      options.memory_bytes = budget;
      auto const report = dcp::load<Storage>(world, {store, "ckpt"}, slice.state(), options);
      slice.check(what);
      if (report.verified_bytes != row_bytes * rows || report.unverified_bytes != 0) throw std::runtime_error(std::string{"not verified after "} + what);
    });
    done(what);
  };
  load(Rows{}, "loaded");
  load(Columns{}, "loaded by columns");
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    Slice<Rows> from{world};
    Slice<Columns> to{world};
    from.fill();
    dcp::ReshardOptions options;
    options.memory_bytes = budget;
    dcp::reshard(world, from.state(), to.state(), options);
    to.check("reshard");
  });
  done("resharded in memory");
  // The teeth: a sixteenth of the tensor does not fit.
  try {
    std::vector<float> const all(static_cast<std::size_t>(rows) * columns / 16);
    std::cerr << "4 GiB fit: nothing limits this process\n";
    return 1;
  } catch (std::bad_alloc const&) {
  }
} catch (std::exception const& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
