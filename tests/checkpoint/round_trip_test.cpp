// SPDX-License-Identifier: Apache-2.0
// ctest: alone
// The law that everything else serves: what ranks save in any layouts, other ranks load in any other layouts, bit for bit.
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/owned_state.hpp>
#include <dcp/checkpoint/reshard.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/safetensors.hpp>

#include <doctest/doctest.h>

#include "support/campaign.hpp"
#include "support/generate.hpp"

#include <mutex>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace {

using Storage = dcp::BasicSafeTensors<dcp::Memory>;

// A tensor of the campaign: its content is a function of name and position, so that it can be checked anywhere.
struct Subject {
  std::string name;
  dcp::DType dtype;
  dcp::Extents shape;
};

std::byte byte_at(Subject const& subject, std::uint64_t position) {
  std::uint64_t x = position * 0x9E3779B97F4A7C15u + std::hash<std::string>{}(subject.name);
  x ^= x >> 29;
  x *= 0xBF58476D1CE4E5B9u;
  return static_cast<std::byte>(x >> 56);
}

class Generator {
 public:
  explicit Generator(std::uint64_t seed) : engine_{seed} {}
  std::int64_t up_to(std::int64_t most) { return std::uniform_int_distribution<std::int64_t>{0, most}(engine_); }
  bool chance(int percent) { return up_to(99) < percent; }
  template <class T>
  T const& pick(std::vector<T> const& list) {
    return list[static_cast<std::size_t>(up_to(static_cast<std::int64_t>(list.size()) - 1))];
  }

  dcp::Extents shape(bool large) {
    int const rank = static_cast<int>(up_to(4));
    std::vector<std::int64_t> const sizes = large ? std::vector<std::int64_t>{1, 7, 64, 129, 400} : std::vector<std::int64_t>{0, 1, 2, 3, 5, 8, 13, 17};
    dcp::Extents shape = dcp::Extents::filled(rank, 1);
    std::int64_t elements = 1;
    for (int d = 0; d < rank; ++d) {
      shape[d] = pick(sizes);
      if (elements * shape[d] > 2'000'000) shape[d] = 1;
      elements *= std::max<std::int64_t>(1, shape[d]);
    }
    return shape;
  }

  // A mesh over `ranks` ranks: a full grid, or a sub-mesh of one.
  dcp::MeshGeometry mesh(std::int64_t ranks) {
    dcp::MeshGeometry full;
    full.world = ranks;
    std::int64_t rest = ranks;
    while (rest > 1 && full.axes < 3) {
      std::vector<std::int64_t> divisors;
      for (std::int64_t d = 1; d <= rest; ++d)
        if (rest % d == 0) divisors.push_back(d);
      std::int64_t const extent = full.axes == 2 ? rest : pick(divisors);
      full.extents[static_cast<std::size_t>(full.axes++)] = extent;
      rest /= extent;
    }
    if (full.axes == 0 || rest > 1) full.extents[static_cast<std::size_t>(full.axes++)] = rest;
    std::int64_t stride = 1;
    for (int a = full.axes; a-- > 0;) {
      full.strides[static_cast<std::size_t>(a)] = stride;
      stride *= full.extents[static_cast<std::size_t>(a)];
    }
    if (!chance(25)) return full;
    dcp::MeshGeometry part;
    part.world = ranks;
    for (int a = 0; a < full.axes; ++a) {
      auto const i = static_cast<std::size_t>(a);
      if (chance(50)) part.base += up_to(full.extents[i] - 1) * full.strides[i];
      else part.extents[static_cast<std::size_t>(part.axes)] = full.extents[i], part.strides[static_cast<std::size_t>(part.axes++)] = full.strides[i];
    }
    return part;
  }

  dcp::Layout layout(dcp::Extents const& shape, std::int64_t ranks, dcp::DType dtype) {
    dcp::Layout layout;
    layout.shape = layout.split_shape = shape;
    layout.mesh = mesh(ranks);
    bool const ordered = chance(30);
    std::vector<int> steps;
    for (int a = 0; a < layout.mesh.axes; ++a) steps.push_back(a);
    std::shuffle(steps.begin(), steps.end(), engine_);
    for (int a = 0; a < layout.mesh.axes; ++a) {
      dcp::Rule& rule = layout.rules[static_cast<std::size_t>(a)];
      if (shape.rank() == 0 || chance(35)) continue;
      rule.kind = dcp::RuleKind::shard;
      rule.dim = static_cast<int>(up_to(shape.rank() - 1));
      // Elements smaller than a byte: only the outermost dimension, of whole bytes per row.
      if (dcp::bits_of(dtype) < 8) rule.dim = 0;
      rule.step = ordered ? steps[static_cast<std::size_t>(a)] : -1;
    }
    if (shape.rank() > 0 && dcp::bits_of(dtype) >= 8 && chance(15)) layout.split_shape[0] += up_to(9);
    if (layout.mesh.axes > 0 && dcp::bits_of(dtype) >= 8 && chance(20))
      dcp::test::make_flat(layout, static_cast<std::size_t>(up_to(layout.mesh.axes - 1)), [&](std::int64_t low, std::int64_t high) { return low + up_to(high - low); });
    return layout;
  }

  std::mt19937_64& engine() { return engine_; }

 private:
  std::mt19937_64 engine_;
};

// This rank's memory of a tensor: its box, perhaps with a pitch; of a flat part its elements.
struct Held {
  Subject const* subject;
  dcp::Layout layout;
  dcp::HeldPart part;
  dcp::Extents strides;
  dcp::Bytes memory;

  void visit(auto each) {   // each(byte of memory, position in the global tensor)
    dcp::Box const& box = part.box;
    if (part.flat) {   // element by element
      auto const size = static_cast<std::size_t>(dcp::bits_of(subject->dtype)) / 8;
      auto const global = dcp::row_major_strides(subject->shape);
      for (std::int64_t element = part.begin; element < part.end; ++element) {
        std::int64_t rest = element, at = 0;
        for (int d = box.rank(); d-- > 0; rest /= box.shape[d]) at += (box.origin[d] + rest % box.shape[d]) * global[d];
        for (std::size_t i = 0; i < size; ++i) each(memory[static_cast<std::size_t>((element - part.begin) * strides[0]) * size + i], static_cast<std::uint64_t>(at) * size + i);
      }
      return;
    }
    auto const transfer = dcp::make_transfer(subject->dtype, subject->dtype, box, box, {memory.data(), strides}, dcp::Box::whole(subject->shape), 0);
    transfer.for_each_run(0, transfer.end, [&](std::uint64_t at, std::byte* bytes, std::size_t size) {
      for (std::size_t i = 0; i < size; ++i) each(bytes[i], at + i);
    });
  }
};

std::vector<Held> hold(std::vector<Subject> const& subjects, std::vector<dcp::Layout> const& layouts, std::int64_t rank, std::uint64_t pitch, dcp::StateDict& state) {
  std::vector<Held> all;
  all.reserve(subjects.size());
  for (std::size_t i = 0; i < subjects.size(); ++i) {
    auto const part = dcp::held_by(layouts[i], rank);
    if (!part) continue;
    dcp::Box const* const box = &part->box;
    Held& held = all.emplace_back(Held{&subjects[i], layouts[i], *part, part->flat ? dcp::Extents{1} : dcp::row_major_strides(box->shape), {}});
    std::int64_t elements = part->elements();
    if (part->flat) {   // of a wider buffer, one element in `pitch`
      held.strides[0] = 1 + static_cast<std::int64_t>(pitch);
      elements *= held.strides[0];
    } else if (pitch > 0 && box->rank() >= 2 && dcp::bits_of(subjects[i].dtype) >= 8 && !box->empty()) {
      // Rows with a gap behind each.
      for (int d = 0; d + 1 < box->rank(); ++d) held.strides[d] = 0;
      std::int64_t stride = box->shape[box->rank() - 1] + static_cast<std::int64_t>(pitch);
      for (int d = box->rank() - 1; d-- > 0;) {
        held.strides[d] = stride;
        stride *= box->shape[d];
      }
      elements = stride;
    }
    held.memory.assign(static_cast<std::size_t>((elements * dcp::bits_of(subjects[i].dtype) + 7) / 8) + 1, std::byte{0xEE});
    state.add_tensor(subjects[i].name, subjects[i].dtype, layouts[i], {held.memory.data(), held.strides});
  }
  return all;
}

std::vector<Subject> subjects_of(Generator& random) {
  std::vector<dcp::DType> const dtypes{dcp::DType::f32, dcp::DType::bf16, dcp::DType::u8, dcp::DType::i64, dcp::DType::f8_e4m3, dcp::DType::boolean, dcp::DType::c64, dcp::DType::f4, dcp::DType::f6_e3m2};
  std::vector<Subject> subjects;
  bool const large = random.chance(16);
  for (std::int64_t i = 0, count = 1 + random.up_to(8); i < count; ++i) {
    Subject subject{"layer." + std::to_string(i) + ".weight", random.pick(dtypes), random.shape(large)};
    if (dcp::bits_of(subject.dtype) < 8) {
      if (subject.shape.rank() == 0) subject.shape = dcp::Extents{8};
      subject.shape[subject.shape.rank() - 1] = (subject.shape[subject.shape.rank() - 1] + 7) / 8 * 8;
      if (subject.shape.rank() == 1) subject.shape = dcp::Extents{3, subject.shape[0]};
    }
    subjects.push_back(subject);
  }
  return subjects;
}

}  // namespace

TEST_CASE("law: a state saved on any mesh and placement loads on any other, bit for bit, and the bytes on the medium do not depend on the mesh") {
  std::uint64_t const base_seed = dcp::test::first_seed();
  for (int round = 0; round < dcp::test::rounds(120, 3000); ++round) {
    std::uint64_t const seed = base_seed + static_cast<std::uint64_t>(round);
    CAPTURE(seed);
    Generator random{seed};
    auto const subjects = subjects_of(random);
    dcp::SafeTensorsOptions options;
    if (random.chance(30)) options.layout = dcp::FileLayout::sharded;
    if (random.chance(30)) options.max_file_bytes = 200;
    dcp::Memory store;
    std::vector<dcp::Bytes> first_files;
    for (int generation = 0; generation < 2; ++generation) {
      int const writers = static_cast<int>(1 + random.up_to(6)), readers = static_cast<int>(1 + random.up_to(6));
      auto const layouts_for = [&](int ranks) {
        std::vector<dcp::Layout> layouts;
        for (auto const& subject : subjects) layouts.push_back(random.layout(subject.shape, ranks, subject.dtype));
        return layouts;
      };
      auto const write_layouts = layouts_for(writers), read_layouts = layouts_for(readers);
      auto const pitch = static_cast<std::uint64_t>(random.up_to(2)), read_pitch = static_cast<std::uint64_t>(random.up_to(2));
      std::int64_t const writers_per_file = random.chance(25) ? 1 + random.up_to(2) : 16;
      int const threads = static_cast<int>(1 + random.up_to(2));
      bool const budget = random.chance(50);
      bool const shuffle = random.chance(50);
      CAPTURE(writers);
      CAPTURE(readers);
      std::mutex mutex;
      std::string problem;
      dcp::run_threads(writers, [&](dcp::ThreadComm& world) {
        dcp::StateDict state;
        auto held = hold(subjects, write_layouts, world.rank(), pitch, state);
        for (auto& part : held) part.visit([&](std::byte& byte, std::uint64_t at) { byte = byte_at(*part.subject, at); });
        dcp::StateDict turned;
        if (shuffle && world.rank() % 2 == 1)
          for (auto at = held.rbegin(); at != held.rend(); ++at) turned.add_tensor(at->subject->name, at->subject->dtype, at->layout, {at->memory.data(), at->strides});
        dcp::save<Storage>(world, {store, "run/ckpt"}, turned.empty() ? state : turned,
                           {.if_exists = dcp::IfExists::replace, .memory_bytes = budget ? dcp::least_memory_bytes : dcp::default_memory_bytes, .threads = threads, .writers_per_file = writers_per_file, .storage = options});
      });
      dcp::run_threads(readers, [&](dcp::ThreadComm& world) {
        dcp::StateDict state;
        auto held = hold(subjects, read_layouts, world.rank(), read_pitch, state);
        // Sub-meshes: a tensor may have no reader of this rank's; ranks without any still take part.
        auto const report = dcp::load<Storage>(world, {store, "run/ckpt"}, state, {.read_once = seed % 3 == 0, .threads = threads});
        std::string wrong;
        for (auto& part : held) {
          std::size_t untouched = part.memory.size();
          part.visit([&](std::byte& byte, std::uint64_t at) {
            if (byte != byte_at(*part.subject, at)) wrong = part.subject->name + " at byte " + std::to_string(at);
            --untouched;
            byte = std::byte{0xEE};
          });
          // Gaps and padding stay as they were.
          for (auto const byte : part.memory) if (byte != std::byte{0xEE}) wrong = part.subject->name + ": a byte outside the box was written";
          static_cast<void>(untouched);
        }
        std::lock_guard const lock{mutex};
        if (!wrong.empty()) problem = wrong;
        for (auto const& phase : report.phases)
          if (seed % 3 == 0 && phase.name == "read" && phase.bytes() != report.tensor_bytes) problem = "read " + std::to_string(phase.bytes()) + " bytes of " + std::to_string(report.tensor_bytes);
        if (report.unverified_bytes != 0) problem = "unverified bytes: " + std::to_string(report.unverified_bytes);
      });
      CHECK(problem == "");
      if (!problem.empty()) return;
      // One rank writes the same bytes as any number of ranks.
      dcp::SelfComm self;
      auto const all = dcp::load_from_keys<Storage>(self, {store, "run/ckpt"});
      for (auto const& subject : subjects) {
        auto const bytes = all.tensors().at(subject.name).bytes();
        bool same = true;
        for (std::size_t i = 0; i < bytes.size(); ++i) same = same && bytes[i] == byte_at(subject, i);
        CHECK(same);
      }
      if (options.layout == dcp::FileLayout::final) {
        std::vector<dcp::Bytes> files;
        dcp::MediumModel<dcp::Memory> medium{store};
        for (auto const& entry : medium.list("run/ckpt"))
          if (entry.name != dcp::record_name) files.push_back(dcp::read_file(medium, "run/ckpt/" + entry.name, 1u << 30));
        if (generation == 0) first_files = files;
        CHECK(files == first_files);
      }
      CHECK(dcp::MediumModel<dcp::Memory>{store}.list("run").size() == 1);
    }
  }
}

TEST_CASE("law: reshard moves any layout into any other, bit for bit") {
  std::uint64_t const base_seed = dcp::test::first_seed();
  for (int round = 0; round < dcp::test::rounds(120, 3000); ++round) {
    std::uint64_t const seed = base_seed + static_cast<std::uint64_t>(round);
    CAPTURE(seed);
    Generator random{seed};
    auto const subjects = subjects_of(random);
    int const ranks = static_cast<int>(1 + random.up_to(6));
    std::vector<dcp::Layout> from, to;
    for (auto const& subject : subjects) {
      from.push_back(random.layout(subject.shape, ranks, subject.dtype));
      to.push_back(random.layout(subject.shape, ranks, subject.dtype));
    }
    std::mutex mutex;
    std::string problem;
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      dcp::StateDict source, target;
      auto held = hold(subjects, from, world.rank(), 1, source);
      auto wanted = hold(subjects, to, world.rank(), 0, target);
      for (auto& part : held) part.visit([&](std::byte& byte, std::uint64_t at) { byte = byte_at(*part.subject, at); });
      dcp::reshard(world, source, target);
      for (auto& part : wanted)
        part.visit([&](std::byte& byte, std::uint64_t at) {
          std::lock_guard const lock{mutex};
          if (byte != byte_at(*part.subject, at)) problem = part.subject->name + " at byte " + std::to_string(at);
        });
    });
    CHECK(problem == "");
    if (!problem.empty()) return;
  }
}
