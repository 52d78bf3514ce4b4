// SPDX-License-Identifier: Apache-2.0
#include <dcp/plan/save_plan.hpp>

#include "../support/generate.hpp"

#include <doctest/doctest.h>

#include <cstring>
#include <deque>
#include <memory>
#include <set>
#include <string>
#include <vector>

using namespace dcp;
using namespace dcp::test;

namespace {

// A state over some ranks, each rank's memory, and the files that it must become, as a reference made element by element.
struct Scene {
  std::int64_t ranks = 1;
  std::vector<TensorSpec> tensors;
  FilePlan files;
  SavePlan::Options options;
  std::vector<Bytes> contents;                        // of each tensor, dense
  std::vector<Bytes> images;                          // of each file
  std::deque<Bytes> memory;
  std::vector<std::vector<Transfer>> held;            // of each rank
  std::unique_ptr<Shares> shares;

  // A tensor of random bytes, stored whole at the end of file `file`.
  void add(Random& random, std::uint32_t file, DType dtype, Layout const& layout) {
    auto const t = static_cast<std::uint32_t>(tensors.size());
    tensors.push_back({"t" + std::to_string(t), dtype, layout});
    contents.push_back(random.bytes(bytes_of(dtype, layout.shape.elements())));
    auto& image = images[file];
    files.stored.push_back({t, file, image.size(), Box::whole(layout.shape)});
    image.insert(image.end(), contents.back().begin(), contents.back().end());
    files.files[file].size = image.size();
  }
  // A file that begins with `header` bytes.
  std::uint32_t add_file(Random& random, std::size_t header) {
    PlannedFile file;
    file.path = "f" + std::to_string(files.files.size());
    file.size = header;
    images.push_back(random.bytes(header));
    file.literals.push_back({0, images.back()});
    files.files.push_back(file);
    return static_cast<std::uint32_t>(files.files.size() - 1);
  }
  // Gives every rank memory with its part of every tensor, at distances that are not those of a dense part, and the plan of its writes.
  void hand_out(Random& random) {
    shares = std::make_unique<Shares>(tensors, ranks);
    held.resize(static_cast<std::size_t>(ranks));
    for (std::int64_t rank = 0; rank < ranks; ++rank)
      for (auto const& stored : files.stored) {
        TensorSpec const& tensor = tensors[stored.tensor];
        auto const coordinate = tensor.layout.mesh.coordinate_of(rank);
        if (!coordinate) continue;
        Box const box = box_at(tensor.layout, *coordinate);
        if (box.empty()) continue;
        std::int64_t const bits = bits_of(tensor.dtype);
        Extents pitch = box.shape;
        if (bits >= 8)
          for (int d = 0; d < pitch.rank(); ++d) pitch[d] += random.between(0, 2);
        MemoryView view{nullptr, row_major_strides(pitch)};
        auto& bytes = memory.emplace_back(random.bytes(bytes_of(tensor.dtype, pitch.elements())));
        view.data = bytes.data();
        copy_in(tensor, contents[stored.tensor], box, view);
        Transfer transfer = make_transfer(tensor.dtype, tensor.dtype, box, box, view, stored.box, stored.offset);
        CellRange const range = shares->range_of(stored.tensor, *coordinate);
        transfer.begin = range.begin * std::min<std::int64_t>(8, bits) / 8;
        transfer.end = range.end * std::min<std::int64_t>(8, bits) / 8;
        transfer.tensor = stored.tensor;
        transfer.file = stored.file;
        held[static_cast<std::size_t>(rank)].push_back(transfer);
      }
    for (std::int64_t rank = 0; rank < ranks; ++rank)
      for (std::uint32_t f = 0; f < files.files.size(); ++f) append_literals(files, f, rank, ranks, held[static_cast<std::size_t>(rank)]);
    for (auto& transfers : held) random.shuffle(transfers);
  }
  SavePlan plan_of(std::int64_t rank) const { return {tensors, *shares, files, held[static_cast<std::size_t>(rank)], rank, ranks, options}; }

 private:
  static void copy_in(TensorSpec const& tensor, Bytes const& content, Box const& box, MemoryView const& view) {
    std::int64_t const bits = bits_of(tensor.dtype);
    Extents const strides = row_major_strides(tensor.layout.shape);
    for_each_element(box, [&](Extents const& index) {
      Extents inside = index;
      for (int d = 0; d < index.rank(); ++d) inside[d] -= box.origin[d];
      std::int64_t const from = linear(index, strides) * bits, to = linear(inside, view.strides) * bits;
      for (std::int64_t bit = 0; bit < bits; ++bit) {   // a bit at a time: elements of 4 and 6 bits too
        auto const source = (content[static_cast<std::size_t>((from + bit) / 8)] >> static_cast<int>((from + bit) % 8)) & std::byte{1};
        auto& target = view.data[(to + bit) / 8];
        auto const place = static_cast<int>((to + bit) % 8);
        target = (target & ~(std::byte{1} << place)) | (source << place);
        if (bits >= 8 && bit % 8 == 0) target = content[static_cast<std::size_t>((from + bit) / 8)], bit += 7;
      }
    });
  }
};

// What ranks did to a file.
struct Played {
  Bytes bytes;
  std::vector<int> writers, arrivals;   // of each byte
  explicit Played(std::size_t size) : bytes(size), writers(size, 0), arrivals(size, 0) {}
};

// Lets all ranks play their plans, in windows of about `window` bytes, and checks every promise of SavePlan.
void check_plans(Scene const& scene, std::uint64_t window_bytes) {
  std::vector<SavePlan> plans;
  for (std::int64_t rank = 0; rank < scene.ranks; ++rank) plans.push_back(scene.plan_of(rank));
  std::uint64_t const block = scene.options.block_bytes;
  for (std::uint32_t f = 0; f < scene.files.files.size(); ++f) {
    CAPTURE(f);
    std::uint64_t const size = scene.files.files[f].size;
    Bytes const& wanted = scene.images[f];
    Played file{static_cast<std::size_t>(size)};

    // One owner a block, the same for all ranks.
    std::set<std::int64_t> owners;
    bool agreed = true;
    for (std::uint64_t at = 0; at < size; at += block) {
      std::int64_t const owner = plans[0].owner_of(f, at);
      owners.insert(owner);
      for (auto const& plan : plans) agreed = agreed && plan.owner_of(f, at) == owner && plan.owner_of(f, std::min(size - 1, at + block - 1)) == owner;
    }
    REQUIRE(agreed);
    if (!owners.empty()) REQUIRE((*owners.begin() >= 0 && *owners.rbegin() < scene.ranks));
    if (scene.ranks > scene.options.writers_per_file) REQUIRE(static_cast<std::int64_t>(owners.size()) <= scene.options.writers_per_file);

    bool aligned = true, owned_by_owner = true, whole = true, right = true, to_owner = true;
    for (std::uint64_t begin = 0; begin < size; begin += window_bytes) {
      std::uint64_t const end = std::min(begin + window_bytes, size);
      struct Message {
        std::int64_t owner;
        FileRange range;
        Bytes bytes;
      };
      std::vector<Message> messages;
      std::vector<std::vector<FileRange>> gathered(plans.size());
      for (std::size_t rank = 0; rank < plans.size(); ++rank) {
        auto const& plan = plans[rank];
        auto const window = plan.window(f, begin, end);
        auto const check_range = [&](FileRange range) {
          aligned = aligned && range.begin % block == 0 && (range.end % block == 0 || range.end == size) && range.begin >= begin && range.end <= end && range.begin < range.end;
          for (std::uint64_t at = range.begin; at < range.end; at += block) owned_by_owner = owned_by_owner && plan.owner_of(f, at) == static_cast<std::int64_t>(rank);
          for (auto at = range.begin; at < range.end; ++at) ++file.writers[static_cast<std::size_t>(at)];
        };
        for (auto const& range : window.direct) {
          check_range(range);
          whole = whole && plan.gather(f, range.begin, range.end, file.bytes.data() + range.begin) == range.size();
        }
        for (auto const& range : window.gathered) {
          check_range(range);
          std::uint64_t local = 0;
          plan.for_each_local_run(f, range.begin, range.end, [&](std::uint32_t, FileRange run) {
            local += run.size();
            for (auto at = run.begin; at < run.end; ++at) ++file.arrivals[static_cast<std::size_t>(at)];
          });
          // What gather copies is what for_each_local_run says, and nothing beside it.
          Bytes part(range.size()), again(range.size(), std::byte{0x5A});
          whole = whole && plan.gather(f, range.begin, range.end, part.data()) == local && plan.gather(f, range.begin, range.end, again.data()) == local;
          plan.for_each_local_run(f, range.begin, range.end, [&](std::uint32_t, FileRange run) {
            std::memcpy(file.bytes.data() + run.begin, part.data() + (run.begin - range.begin), run.size());
            std::fill(again.begin() + static_cast<std::ptrdiff_t>(run.begin - range.begin), again.begin() + static_cast<std::ptrdiff_t>(run.end - range.begin), std::byte{0x5A});
          });
          right = right && std::count(again.begin(), again.end(), std::byte{0x5A}) == static_cast<std::ptrdiff_t>(again.size());
          gathered[rank].push_back(range);
        }
        for (auto const& part : window.outgoing) {
          Message message{part.owner, part.range, Bytes(part.range.size())};
          whole = whole && plan.gather_transfer(part.transfer, part.range, message.bytes.data()) == part.range.size();
          to_owner = to_owner && part.owner != static_cast<std::int64_t>(rank);
          messages.push_back(std::move(message));
        }
      }
      for (auto const& message : messages)
        for (auto at = message.range.begin; at < message.range.end; ++at) {
          auto const& ranges = gathered[static_cast<std::size_t>(message.owner)];
          to_owner = to_owner && std::any_of(ranges.begin(), ranges.end(), [&](FileRange const& r) { return r.begin <= at && at < r.end; });
          ++file.arrivals[static_cast<std::size_t>(at)];
          file.bytes[static_cast<std::size_t>(at)] = message.bytes[static_cast<std::size_t>(at - message.range.begin)];
        }
      // A direct byte has no arrival, a gathered one exactly one.
      for (auto const& ranges : gathered)
        for (auto const& range : ranges)
          for (auto at = range.begin; at < range.end; ++at) right = right && file.arrivals[static_cast<std::size_t>(at)]-- == 1;
    }
    REQUIRE(aligned);
    REQUIRE(owned_by_owner);
    REQUIRE(whole);
    REQUIRE(to_owner);
    REQUIRE(right);
    REQUIRE(std::count(file.writers.begin(), file.writers.end(), 1) == static_cast<std::ptrdiff_t>(size));
    REQUIRE(std::count(file.arrivals.begin(), file.arrivals.end(), 0) == static_cast<std::ptrdiff_t>(size));
    REQUIRE(file.bytes == wanted);
  }
}

// A layout whose cells are whole bytes of `dtype`, on a communicator of exactly `ranks`.
Layout layout_for(Random& random, DType dtype, std::int64_t ranks) {
  for (;;) {
    Layout layout;
    if (random.one_in(6)) {
      layout = replicated_layout(any_shape(random, 3, 300), ranks);
    } else if (random.one_in(6)) {
      layout = single_rank_layout(any_shape(random, 3, 300), random.between(0, ranks - 1), ranks);
    } else {
      std::vector<std::int64_t> extents;
      for (auto rest = ranks; rest > 1;) {
        std::int64_t const divisor = random.between(1, rest);
        if (rest % divisor != 0 || (divisor == 1 && extents.size() > 1)) continue;
        extents.push_back(divisor);
        rest /= divisor;
      }
      layout.mesh = mesh_of(extents);
      if (random.one_in(4)) layout.mesh = any_sub_mesh(random, layout.mesh);
      layout.shape = any_shape(random, 4, 500);
      if (random.one_in(5)) layout.shape = random.one_in(2) ? Extents{random.between(1, 3), random.between(1, 300)} : Extents{random.between(1, 300), random.between(1, 3)};
      layout.split_shape = layout.shape;
      layout.rules = any_rules(random, layout.mesh.axes, layout.shape.rank());
      if (random.one_in(5))
        for (int d = 0; d < layout.shape.rank(); ++d) layout.split_shape[d] += random.between(0, 9);
    }
    bool whole_bytes = true;
    for (std::int64_t cell = 0; cell < cells(layout); ++cell) whole_bytes = whole_bytes && on_byte_boundaries(dtype, box_at(layout, cell_coordinate(layout, cell)), Box::whole(layout.shape));
    if (whole_bytes && layout.shape.elements() * bits_of(dtype) % 8 == 0) return layout;
  }
}

constexpr std::array<DType, 8> dtypes{DType::u8, DType::f16, DType::f32, DType::f64, DType::c64, DType::f4, DType::f6_e2m3, DType::i8};

Scene any_scene(Random& random) {
  Scene scene;
  scene.ranks = random.between(1, 7);
  scene.options.block_bytes = random.any_of(std::array<std::uint64_t, 6>{16, 64, 24, 1, 48, 256});
  scene.options.writers_per_file = random.any_of(std::array<std::int64_t, 5>{16, 16, 3, 2, 1});
  scene.options.long_run_bytes = random.any_of(std::array<std::uint64_t, 4>{1, 8, 64, 1 << 20});
  scene.options.segment_bytes = random.any_of(std::array<std::uint64_t, 4>{1, 40, 128, 1024});
  scene.options.forwarded_bytes = random.any_of(std::array<std::uint64_t, 3>{1, 256, 1000});
  for (auto count = random.between(1, 3); count > 0; --count) {
    auto const file = scene.add_file(random, static_cast<std::size_t>(random.one_in(4) ? 64 : random.between(0, 200)));
    for (auto n = random.between(0, 8); n > 0; --n) {
      DType const dtype = random.any_of(dtypes);
      scene.add(random, file, dtype, layout_for(random, dtype, scene.ranks));
    }
  }
  scene.hand_out(random);
  return scene;
}

Layout layout_on(std::vector<std::int64_t> const& extents, Extents const& shape, std::vector<Rule> const& rules) {
  Layout layout;
  layout.mesh = mesh_of(extents);
  layout.shape = layout.split_shape = shape;
  std::copy(rules.begin(), rules.end(), layout.rules.begin());
  return layout;
}
constexpr Rule shard_0{RuleKind::shard, 0, -1}, shard_1{RuleKind::shard, 1, -1}, replicate{};

}  // namespace

TEST_CASE("law: whatever ranks hold, their plans write every byte once, right, and every block by its one owner") {
  auto const seed = first_seed();
  for (std::uint64_t round = 0; round < 1500; ++round) {
    INFO("DCP_SEED=", seed + round);
    Random random{seed + round};
    Scene const scene = any_scene(random);
    auto const window = scene.options.block_bytes * static_cast<std::uint64_t>(random.one_in(3) ? 1000 : random.between(1, 20));
    CAPTURE(scene.ranks);
    CAPTURE(scene.options.block_bytes);
    CAPTURE(window);
    check_plans(scene, window);
  }
}

TEST_CASE("SavePlan: replicas of a large tensor each write a part, and cuts inside a block travel") {
  for (std::uint64_t block : {4096u, 65536u}) {
    Random random{block};
    Scene scene;
    scene.ranks = 4;
    scene.options.block_bytes = block;
    auto const file = scene.add_file(random, 1000);
    scene.add(random, file, DType::f32, layout_on({4}, {700, 301}, {replicate}));
    scene.add(random, file, DType::f16, layout_on({2, 2}, {1400, 401}, {replicate, shard_0}));
    scene.add(random, file, DType::f32, layout_on({2, 2}, {100, 401}, {replicate, shard_1}));
    scene.add(random, file, DType::f64, layout_on({4}, {401, 101}, {shard_0}));
    scene.hand_out(random);
    check_plans(scene, 1 << 20);
    check_plans(scene, block);
    for (auto const load : scene.shares->loads()) CHECK(load > 0);
  }
}

TEST_CASE("SavePlan: long runs stay with the rank that has them, and only edge blocks are gathered") {
  Random random{1};
  Scene scene;
  scene.ranks = 4;
  auto const file = scene.add_file(random, 1000);
  scene.add(random, file, DType::f32, layout_on({4}, {256, 1024}, {shard_0}));   // 256 KiB a rank
  scene.hand_out(random);
  check_plans(scene, 1 << 20);
  for (std::int64_t rank = 0; rank < 4; ++rank) {
    CAPTURE(rank);
    auto const window = scene.plan_of(rank).window(file, 0, scene.files.files[file].size);
    std::uint64_t direct = 0, sent = 0;
    for (auto const& range : window.direct) direct += range.size();
    for (auto const& part : window.outgoing) sent += part.range.size();
    CHECK(direct >= (256 << 10) - 2 * 4096);
    CHECK(sent <= 4096);
    CHECK(window.gathered.size() <= 2);
  }
}

TEST_CASE("SavePlan: columns go to the owners of segments, who then write in one piece") {
  Random random{1};
  Scene scene;
  scene.ranks = 4;
  scene.options.segment_bytes = 64 << 10;
  auto const file = scene.add_file(random, 4096);
  scene.add(random, file, DType::f32, layout_on({4}, {256, 256}, {shard_1}));   // rows of 256 bytes a rank, four segments
  scene.hand_out(random);
  check_plans(scene, 1 << 20);
  for (std::int64_t rank = 0; rank < 4; ++rank) {
    auto const window = scene.plan_of(rank).window(file, 0, scene.files.files[file].size);
    std::uint64_t gathered = 0;
    for (auto const& range : window.gathered) gathered += range.size();
    CHECK(gathered >= (64 << 10) - 4096);
    CHECK(gathered <= (64 << 10) + 4096);   // the header's block goes with the segment behind it
    CHECK(window.gathered.size() <= 2);
  }
}

TEST_CASE("SavePlan: a file of one rank is that rank's alone") {
  Random random{3};
  Scene scene;
  scene.ranks = 3;
  auto const file = scene.add_file(random, 100);
  scene.files.files[file].only_rank = 1;
  scene.add(random, file, DType::f32, single_rank_layout({40, 40}, 1, 3));
  scene.add(random, file, DType::u8, single_rank_layout({33}, 1, 3));
  scene.hand_out(random);
  check_plans(scene, 4096);
  auto const window = scene.plan_of(1).window(file, 0, scene.files.files[file].size);
  CHECK(window.outgoing.empty());
  CHECK(window.gathered.empty());
  REQUIRE(window.direct.size() == 1);
  CHECK(window.direct[0].size() == scene.files.files[file].size);
}

TEST_CASE("SavePlan: with more ranks than may open a file, the rest forward to writers spread over the job") {
  Random random{4};
  Scene scene;
  scene.ranks = 7;
  scene.options = {.block_bytes = 64, .writers_per_file = 3, .long_run_bytes = 1, .segment_bytes = 128, .forwarded_bytes = 256};
  for (int f = 0; f < 5; ++f) {
    auto const file = scene.add_file(random, 90);
    scene.add(random, file, DType::f32, layout_on({7}, {70, 11}, {shard_0}));
    scene.add(random, file, DType::f16, layout_on({7}, {13, 70}, {shard_1}));
  }
  scene.hand_out(random);
  check_plans(scene, 640);
  std::set<std::int64_t> owners;
  auto const plan = scene.plan_of(0);
  for (std::uint32_t f = 0; f < 5; ++f)
    for (std::uint64_t at = 0; at < scene.files.files[f].size; at += 64) owners.insert(plan.owner_of(f, at));
  CHECK(owners.size() == 7);
}

namespace {

std::vector<PlannedFile> files_of(std::vector<std::uint64_t> const& sizes) {
  std::vector<PlannedFile> files;
  for (auto const size : sizes) {
    files.emplace_back();
    files.back().size = size;
  }
  return files;
}

}  // namespace

TEST_CASE("law: slots cover the shared files, few ranks open a file, and ranks own equal parts where files are not too large") {
  auto const seed = first_seed();
  for (std::uint64_t round = 0; round < 3000; ++round) {
    INFO("DCP_SEED=", seed + round);
    Random random{seed + round};
    std::int64_t const ranks = random.between(1, random.one_in(2) ? 20 : 3000), writers = random.between(1, 20);
    std::uint64_t const block = random.any_of(std::array<std::uint64_t, 4>{1, 64, 4096, 3000}), least = random.any_of(std::array<std::uint64_t, 3>{1, 100'000, 8 << 20});
    std::vector<std::uint64_t> sizes;
    for (auto count = random.between(1, random.one_in(2) ? 5 : 200); count > 0; --count)
      sizes.push_back(static_cast<std::uint64_t>(random.one_in(8) ? 0 : random.one_in(20) ? std::int64_t{1} << random.between(0, 50) : random.between(1, 100'000'000)));
    auto files = files_of(sizes);
    for (auto& file : files)
      if (random.one_in(10)) file.only_rank = random.between(0, ranks - 1);
    ForwardingSlots const slots{files, ranks, writers, block, least};
    std::uint64_t total = 0, largest = 0, most = 0;
    std::vector<std::uint64_t> owned(static_cast<std::size_t>(ranks), 0);
    std::size_t s = 0;
    bool covered = true, aligned = true;
    for (std::uint32_t f = 0; f < files.size(); ++f) {
      if (files[f].only_rank >= 0 || files[f].size == 0) continue;
      total += files[f].size;
      largest = std::max(largest, files[f].size);
      std::uint64_t at = 0;
      std::set<std::int64_t> owners;
      for (; s < slots.all().size() && slots.all()[s].file == f; ++s) {
        auto const& slot = slots.all()[s];
        covered = covered && slot.begin == at && slot.end > at;
        aligned = aligned && slot.begin % block == 0;
        owners.insert(slot.owner);
        owned.at(static_cast<std::size_t>(slot.owner)) += slot.end - slot.begin;
        at = slot.end;
      }
      covered = covered && at == files[f].size;
      REQUIRE(static_cast<std::int64_t>(owners.size()) <= writers);
    }
    REQUIRE(covered);
    REQUIRE(aligned);
    REQUIRE(s == slots.all().size());
    for (auto const bytes : owned) most = std::max(most, bytes);
    std::uint64_t const part = std::max({ceil_div(total, static_cast<std::uint64_t>(ranks)), least, block});
    if (writers > 1 && largest <= static_cast<std::uint64_t>(writers - 1) * part) REQUIRE(most <= part + block);

    // And the windows are each byte once, of several owners in a row.
    std::uint64_t const bytes = block * static_cast<std::uint64_t>(random.between(1, 5000)) + (total / 5000 / block) * block;
    ForwardingSlots const none;
    for (auto const* how : {&slots, &none}) {
      SharedWindows const windows{files, *how, bytes};
      std::vector<std::pair<std::uint32_t, FileRange>> parts;
      for (std::uint64_t w = 0; w < windows.size(); ++w)
        if (auto const window = windows[w]; window.range.begin < window.range.end) parts.push_back({window.file, window.range});
      std::sort(parts.begin(), parts.end(), [](auto const& a, auto const& b) { return a.first != b.first ? a.first < b.first : a.second.begin < b.second.begin; });
      std::size_t p = 0;
      bool once = true;
      for (std::uint32_t f = 0; f < files.size(); ++f) {
        if (files[f].only_rank >= 0) continue;
        std::uint64_t at = 0;
        for (; p < parts.size() && parts[p].first == f; ++p) {
          once = once && parts[p].second.begin == at && parts[p].second.size() <= bytes;
          at = parts[p].second.end;
        }
        once = once && at == files[f].size;
      }
      REQUIRE(once);
      REQUIRE(p == parts.size());
    }
  }
}

TEST_CASE("SavePlan: tensors without elements and empty files are no work") {
  Random random{5};
  Scene scene;
  scene.ranks = 2;
  scene.options.block_bytes = 16;
  scene.add_file(random, 0);
  auto const file = scene.add_file(random, 0);
  scene.add(random, file, DType::f32, layout_on({2}, {0, 3}, {shard_0}));
  scene.add(random, file, DType::f32, layout_on({2}, {5, 3}, {shard_0}));
  scene.add(random, file, DType::f32, layout_on({2}, {3, 0}, {shard_0}));
  scene.add(random, file, DType::f32, layout_on({2}, {}, {replicate}));
  scene.hand_out(random);
  check_plans(scene, 16);
  check_plans(scene, 1600);
}
