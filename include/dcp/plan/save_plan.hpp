// SPDX-License-Identifier: Apache-2.0
#pragma once
// Which rank writes which bytes of which file, so that each aligned block of a file is written by exactly one rank.
//
// Tensors in a file are aligned only to their element, so nearly every run of a rank ends inside a block that another rank also
// has bytes of. Two ranks that wrote that block (directly, or from two clients of a network file system) would read, change and
// write it as a whole, and one would lose. Hence owners, a pure function of the position that every rank evaluates for itself:
//
//   - a file of one rank (sharded layout) is owned by that rank;
//   - where a tensor lies in long runs, a block is owned by the rank that writes its first byte. Only the block at the end of a
//     run is shared, and only its fragments travel;
//   - where it lies in short runs (split along an inner dimension, small tensors), fixed segments go around the ranks, and every
//     rank sends its runs to the segment's owner: many short writes become a few long ones;
//   - in jobs of more ranks than may open one file, the files end to end are cut into as many equal slots as there are ranks, or
//     fewer, so that no file has more slots than ranks may open it; a rank writes one slot, and everything in it is sent to it.

#include <dcp/base/config.hpp>
#include <dcp/core/encoding.hpp>
#include <dcp/plan/arrangement.hpp>
#include <dcp/plan/shares.hpp>
#include <dcp/plan/transfer_index.hpp>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace dcp {

/// Bytes of a file that are no tensor data: headers.
struct Literal {
  std::uint64_t offset;
  Bytes bytes;
};
struct PlannedFile {
  std::string path;                  // relative to the checkpoint, '/' between components
  std::uint64_t size = 0;
  std::vector<Literal> literals;
  std::int64_t only_rank = -1;       // the rank that alone writes it, or -1
};
/// What is stored of a tensor of the state: the tensor as it is, or a part of what it is encoded as.
struct StoredForm {
  std::uint32_t tensor;     // of those that the checkpoint has of the state
  DType dtype{};
  Extents shape;
  bool recoded = false;
  PartGrid grid{};          // of a part: how it lies along the tensor
};
/// A box of a tensor, stored densely at `offset` of a file.
struct StoredBox {
  std::uint32_t tensor;   // index into the tensors planned, which are StoredForms where something is encoded
  std::uint32_t file;
  std::uint64_t offset;
  Box box;
};
/// Bytes of a file of one rank that say which CRC-32 something stored beside them has: made when they are written.
struct CrcLiteral {
  std::uint32_t stored;              // index into the stored boxes, none of them empty
  std::uint64_t offset;              // in the same file
  Bytes bytes;
  std::vector<std::uint32_t> at;     // where in them the CRC-32 of the box's bytes belongs: four bytes, little-endian
};
/// What a format makes of a list of tensors: pure, and equal on all ranks for files that ranks share, but for texts, which only the
/// rank needs that writes them. A file of one rank is listed on that rank only.
struct FilePlan {
  std::vector<PlannedFile> files;
  std::vector<StoredBox> stored;                               // sorted by (file, offset)
  std::vector<CrcLiteral> crc_literals;                        // sorted by the stored box
  std::vector<std::pair<std::string, Bytes>> commit_files;     // small files that rank 0 writes at the commit

  template <class = Deferred>
  std::uint64_t memory_bytes() const {
    std::uint64_t bytes = files.capacity() * sizeof(PlannedFile) + stored.capacity() * sizeof(StoredBox);
    for (auto const& file : files)
      for (auto const& literal : file.literals) bytes += sizeof(Literal) + literal.bytes.capacity();
    for (auto const& literal : crc_literals) bytes += sizeof(CrcLiteral) + literal.bytes.capacity() + literal.at.capacity() * sizeof(std::uint32_t);
    for (auto const& [path, text] : commit_files) bytes += text.capacity();
    return bytes;
  }
};

/// The rank that writes the literals of a file which ranks share, by the file's number; others need not have them.
constexpr std::int64_t header_writer(std::uint32_t file, std::int64_t ranks) { return static_cast<std::int64_t>(file) % ranks; }

/// Appends the write of bytes that are no tensor's.
template <class = Deferred>
Transfer& append_bytes(std::uint32_t file, std::uint64_t offset, ConstByteSpan bytes, std::vector<Transfer>& transfers) {
  Transfer& transfer = transfers.emplace_back();
  transfer.file = file;
  transfer.dtype = transfer.memory_dtype = DType::u8;
  transfer.offset = offset;
  transfer.shape = Extents{static_cast<std::int64_t>(bytes.size())};
  transfer.file_strides = transfer.memory.strides = Extents{1};
  transfer.memory.data = const_cast<std::byte*>(bytes.data());   // only ever read
  transfer.end = static_cast<std::int64_t>(bytes.size());
  return transfer;
}
/// Appends the writes of file `f`'s literals, if `rank` is the one to write them.
template <class = Deferred>
void append_literals(FilePlan const& plan, std::uint32_t f, std::int64_t rank, std::int64_t ranks, std::vector<Transfer>& transfers) {
  PlannedFile const& file = plan.files[f];
  if ((file.only_rank >= 0 ? file.only_rank : header_writer(f, ranks)) != rank) return;
  for (auto const& literal : file.literals)
    if (!literal.bytes.empty()) append_bytes(f, literal.offset, literal.bytes, transfers);
}

/// For jobs of more ranks than may open one file: who owns which part of the files that ranks share.
///
/// Law       the slots of a file are disjoint, cover it, begin and end on blocks (or the file's end), and at most `writers_per_file`
///           ranks own some
/// Balance   where no file is larger than `writers_per_file - 1` equal parts of all, every rank owns one such part, or a block less
/// Cost      O(files + ranks)
class ForwardingSlots {
 public:
  struct Slot {
    std::uint32_t file;
    std::uint64_t begin, end;
    std::int64_t owner;
  };

  ForwardingSlots() = default;
  /// `least_bytes`: a rank owns no less, unless there is no more.
  template <class = Deferred>
  ForwardingSlots(std::vector<PlannedFile> const& files, std::int64_t ranks, std::int64_t writers_per_file, std::uint64_t block_bytes, std::uint64_t least_bytes) {
    std::uint64_t total = 0;
    for (auto const& file : files)
      if (file.only_rank < 0) total += file.size;
    if (total == 0) return;
    std::uint64_t const part = std::max({ceil_div(total, static_cast<std::uint64_t>(ranks)), least_bytes, block_bytes});
    // Files lie on a line that is cut every `part` bytes; one that would be cut too often is first shrunk to what may be cut.
    auto const most_cuts = static_cast<std::uint64_t>(std::max<std::int64_t>(1, writers_per_file)) - 1;
    std::uint64_t line = 0;
    for (std::uint32_t f = 0; f < files.size(); ++f) {
      std::uint64_t const size = files[f].size;
      if (files[f].only_rank >= 0 || size == 0) continue;
      if (most_cuts == 0) line = round_up(line, part);
      std::uint64_t const length = most_cuts == 0 ? part : std::min(size, most_cuts * part);
      for (std::uint64_t at = 0, cut = line / part; at < size; ++cut) {
        // Where the next cut of the line falls in the file.
        std::uint64_t const next = (cut + 1) * part - line;
        std::uint64_t const end = next >= length ? size : std::min(size, round_down(scaled(next, size, length), block_bytes));
        if (end > at) slots_.push_back({f, at, end, static_cast<std::int64_t>(cut)});
        at = std::max(at, end);
      }
      line += length;
    }
    // Far apart, so that they are on different nodes.
    std::int64_t const cuts = slots_.back().owner + 1;
    for (auto& slot : slots_) slot.owner = static_cast<std::int64_t>(scaled(static_cast<std::uint64_t>(slot.owner), static_cast<std::uint64_t>(ranks), static_cast<std::uint64_t>(cuts)));
    for (std::size_t s = 0; s < slots_.size(); ++s)
      if (s == 0 || slots_[s].owner != slots_[s - 1].owner) first_of_.push_back(s);
    owners_ = static_cast<std::int64_t>(first_of_.size());
    first_of_.push_back(slots_.size());
  }

  bool empty() const { return slots_.empty(); }
  /// In the order of files and positions.
  std::vector<Slot> const& all() const { return slots_; }
  /// How many ranks own slots, and the numbers [first, last) of the slots of one of them, counted in the order of their slots.
  std::int64_t owners() const { return owners_; }
  std::pair<std::size_t, std::size_t> of_owner(std::int64_t number) const { return {first_of_[static_cast<std::size_t>(number)], first_of_[static_cast<std::size_t>(number) + 1]}; }
  /// The first slot that ends behind `position` of a file.
  template <class = Deferred>
  std::size_t at(std::uint32_t file, std::uint64_t position) const {
    auto const found = std::partition_point(slots_.begin(), slots_.end(), [&](Slot const& slot) { return slot.file != file ? slot.file < file : slot.end <= position; });
    return static_cast<std::size_t>(found - slots_.begin());
  }

 private:
  // a * b / c, for a < c, in more bits than a product of file sizes has.
  static std::uint64_t scaled(std::uint64_t a, std::uint64_t b, std::uint64_t c) {
    __extension__ using Wide = unsigned __int128;
    return static_cast<std::uint64_t>(static_cast<Wide>(a) * b / c);
  }

  std::vector<Slot> slots_;
  std::vector<std::size_t> first_of_;
  std::int64_t owners_ = 0;
};

class SavePlan {
 public:
  static constexpr std::uint64_t long_run_bytes = 64 << 10;       // a run that is worth a write of its own
  static constexpr std::uint64_t segment_bytes = 1 << 20;         // of short runs
  static constexpr std::uint64_t forwarded_bytes = 8 << 20;       // that a rank owns at least where others forward their data to it

  struct Options {
    std::uint64_t block_bytes = 4096;
    std::int64_t writers_per_file = 16;
    std::uint64_t long_run_bytes = SavePlan::long_run_bytes;
    std::uint64_t segment_bytes = SavePlan::segment_bytes;
    std::uint64_t forwarded_bytes = SavePlan::forwarded_bytes;
  };
  /// A run of this rank's data in a window, and the rank that writes it.
  struct Part {
    std::uint32_t transfer;
    std::int64_t owner;
    FileRange range;
  };
  struct Window {
    std::vector<Part> outgoing;        // to other ranks
    std::vector<FileRange> direct;     // blocks that this rank owns and has all bytes of, in long runs
    std::vector<FileRange> gathered;   // all other blocks that this rank owns
  };

  /// `transfers`: what `rank` holds of the stored boxes (its shares) and of literals, in any order; fastest in that of the files.
  /// `forms`: what the stored boxes are of, where something is encoded; it must outlive the plan, as must `tensors`, `shares` and `files`.
  /// `arrangement`: of the state's tensors in those that are stored or encoded, where these are others
  /// `sources`: what transfers refer to and nobody else keeps
  template <class = Deferred>
  SavePlan(std::vector<TensorSpec> const& tensors, Shares const& shares, FilePlan const& files, std::vector<Transfer> transfers, std::int64_t rank, std::int64_t ranks, Options options, std::vector<StoredForm> const* forms = nullptr, Arrangement const* arrangement = nullptr, std::vector<std::unique_ptr<ElementSource>> sources = {})
      : tensors_{tensors}, shares_{shares}, files_{files}, forms_{forms}, arrangement_{arrangement}, rank_{rank}, ranks_{ranks}, options_{options}, sources_{std::move(sources)} {
    index_ = TransferIndex{std::move(transfers)};
    if (ranks > options.writers_per_file) slots_ = {files.files, ranks, options.writers_per_file, options.block_bytes, options.forwarded_bytes};
    if (!slots_.empty()) return;
    in_long_runs_.resize(files.stored.size());
    for (std::size_t s = 0; s < files.stored.size(); ++s) in_long_runs_[s] = lies_in_long_runs(files.stored[s]);
  }

  std::vector<Transfer> const& transfers() const { return index_.transfers(); }
  std::vector<PlannedFile> const& files() const { return files_.files; }
  std::uint64_t block_bytes() const { return options_.block_bytes; }
  ForwardingSlots const& slots() const { return slots_; }
  template <class = Deferred>
  std::uint64_t memory_bytes() const { return index_.memory_bytes() + slots_.all().capacity() * sizeof(ForwardingSlots::Slot) + in_long_runs_.capacity() / 8; }

  /// The rank that writes the block with `position` of file `file`.
  template <class = Deferred>
  std::int64_t owner_of(std::uint32_t file, std::uint64_t position) const {
    if (files_.files[file].only_rank >= 0) return files_.files[file].only_rank;
    if (in_slots(file) && files_.files[file].size > 0) return slots_.all()[slots_.at(file, position)].owner;
    position = round_down(position, options_.block_bytes);
    auto const s = stored_at(file, position);
    if (s == no_box) return header_writer(file, ranks_);
    if (!in_long_runs_[s]) return segment_owner(file, position);
    StoredBox const& stored = files_.stored[s];
    std::int64_t element = static_cast<std::int64_t>((position - stored.offset) * 8 / static_cast<std::uint64_t>(bits_of(dtype_of_stored(stored))));
    Extents index = stored.box.shape;
    for (int d = index.rank(); d-- > 0;) {
      index[d] = stored.box.origin[d] + element % stored.box.shape[d];
      element /= stored.box.shape[d];
    }
    if (forms_ == nullptr) return detail::writer_of(shares_, arrangement_, stored.tensor, index);
    StoredForm const& form = (*forms_)[stored.tensor];
    return detail::writer_of(shares_, arrangement_, form.tensor, form.recoded ? form.grid.first_element(index, shape_of(form.tensor)) : index);
  }

  /// Files without bytes that this rank is to create: no write of anybody does.
  template <class = Deferred>
  std::vector<std::uint32_t> empty_files() const {
    std::vector<std::uint32_t> mine;
    for (std::uint32_t f = 0; f < files().size(); ++f)
      if (files()[f].size == 0 && owner_of(f, 0) == rank_) mine.push_back(f);
    return mine;
  }

  /// What this rank does in [begin, end) of a file: both multiples of the block size, or the end of the file.
  template <class = Deferred>
  Window window(std::uint32_t file, std::uint64_t begin, std::uint64_t end) const {
    Window result;
    std::vector<FileRange> covered, owned;
    std::uint64_t const size = files_.files[file].size, block = options_.block_bytes;
    for_each_local_run(file, begin, end, [&](std::uint32_t transfer, FileRange run) {
      if (!covered.empty() && covered.back().end == run.begin) covered.back().end = run.end;
      else covered.push_back(run);
      for (std::uint64_t at = run.begin; at < run.end;) {
        std::uint64_t const owner_end = std::min(run.end, end_of_same_owner(file, at, run));
        std::int64_t const owner = owner_of(file, at);
        if (owner != rank_) result.outgoing.push_back({transfer, owner, {at, owner_end}});
        else if (!in_slots(file)) add_range(owned, {round_down(at, block), std::min(size, round_up(owner_end, block))});
        at = owner_end;
      }
    });
    // Slots, and segments of short runs, are owned whether this rank has bytes in them or not.
    if (in_slots(file)) {
      for (std::size_t s = slots_.at(file, begin); s < slots_.all().size() && slots_.all()[s].file == file && slots_.all()[s].begin < end; ++s)
        if (auto const& slot = slots_.all()[s]; slot.owner == rank_) owned.push_back({std::max(begin, slot.begin), std::min(end, slot.end)});
    } else if (files_.files[file].only_rank < 0) {
      for (std::size_t s = first_stored(file, begin); s < files_.stored.size() && files_.stored[s].file == file && files_.stored[s].offset < end; ++s)
        if (!in_long_runs_[s]) own_segments(file, stored_range(s), begin, end, owned);
    }
    std::sort(covered.begin(), covered.end(), [](auto const& a, auto const& b) { return a.begin < b.begin; });
    std::sort(owned.begin(), owned.end(), [](auto const& a, auto const& b) { return a.begin < b.begin; });
    owned = merged(owned);
    // Whole blocks that this rank has all bytes of.
    std::vector<FileRange> whole;
    for (auto const& range : merged(covered)) {
      FileRange const inner{round_up(range.begin, block), range.end == size ? size : round_down(range.end, block)};
      if (inner.begin < inner.end) whole.push_back(inner);
    }
    for (auto const& range : owned) {
      std::uint64_t at = range.begin;
      auto next = std::lower_bound(whole.begin(), whole.end(), at, [](FileRange const& r, std::uint64_t p) { return r.end <= p; });
      for (; next != whole.end() && next->begin < range.end; ++next) {
        FileRange const common{std::max(at, next->begin), std::min(range.end, next->end)};
        if (common.begin >= common.end) continue;
        // Short pieces of an owned range are written together with what comes for the gaps between them.
        if (common.size() < options_.long_run_bytes && common.size() < range.size()) continue;
        if (at < common.begin) result.gathered.push_back({at, common.begin});
        result.direct.push_back(common);
        at = common.end;
      }
      if (at < range.end) result.gathered.push_back({at, range.end});
    }
    return result;
  }

  /// Calls visit(index of the transfer, range) for this rank's runs in [begin, end) of a file. Runs of different transfers may interleave.
  template <class Visit>
  void for_each_local_run(std::uint32_t file, std::uint64_t begin, std::uint64_t end, Visit visit) const {
    index_.for_each_touching(file, {begin, end}, [&](std::uint32_t t, std::int64_t from, std::int64_t to) {
      index_[t].for_each_file_run(from, to, [&](std::uint64_t at, std::uint64_t bytes) {
        FileRange const run{std::max(at, begin), std::min(at + bytes, end)};
        if (run.begin < run.end) visit(t, run);
      });
    });
  }

  /// Copies what this rank holds of [begin, end) of a file to `out`, with copy(to, from, bytes). Returns the number of bytes.
  template <class Copy = PlainCopy>
  std::uint64_t gather(std::uint32_t file, std::uint64_t begin, std::uint64_t end, std::byte* out, Copy copy = {}) const {
    std::uint64_t total = 0;
    index_.for_each_touching(file, {begin, end}, [&](std::uint32_t t, std::int64_t, std::int64_t) { total += index_.gather(t, {begin, end}, out, copy); });
    return total;
  }
  template <class = Deferred>
  std::uint64_t gather_transfer(std::uint32_t t, FileRange range, std::byte* out) const { return index_.gather(t, range, out, PlainCopy{}); }

 private:
  static constexpr std::size_t no_box = static_cast<std::size_t>(-1);

  template <class = Deferred>
  static void add_range(std::vector<FileRange>& list, FileRange range) {
    if (!list.empty() && list.back().end >= range.begin && list.back().begin <= range.begin) list.back().end = std::max(list.back().end, range.end);
    else list.push_back(range);
  }
  template <class = Deferred>
  static std::vector<FileRange> merged(std::vector<FileRange> const& sorted) {
    std::vector<FileRange> result;
    for (auto const& range : sorted) add_range(result, range);
    return result;
  }

  DType dtype_of_stored(StoredBox const& stored) const {
    if (forms_ != nullptr) return (*forms_)[stored.tensor].dtype;
    return arrangement_ == nullptr ? tensors_[stored.tensor].dtype : arrangement_->from[stored.tensor].dtype;
  }
  FileRange stored_range(std::size_t s) const {
    StoredBox const& stored = files_.stored[s];
    return {stored.offset, stored.offset + bytes_of(dtype_of_stored(stored), static_cast<std::int64_t>(stored.box.size()))};
  }
  // The first stored box of the file whose bytes reach beyond `position`.
  template <class = Deferred>
  std::size_t first_stored(std::uint32_t file, std::uint64_t position) const {
    auto const at = std::partition_point(files_.stored.begin(), files_.stored.end(), [&](StoredBox const& s) {
      if (s.file != file) return s.file < file;
      return s.offset + bytes_of(dtype_of_stored(s), static_cast<std::int64_t>(s.box.size())) <= position;
    });
    return static_cast<std::size_t>(at - files_.stored.begin());
  }
  // The stored box that holds the byte at `position`; no_box in front of the first.
  template <class = Deferred>
  std::size_t stored_at(std::uint32_t file, std::uint64_t position) const {
    std::size_t const s = first_stored(file, position);
    if (s == files_.stored.size() || files_.stored[s].file != file || files_.stored[s].offset > position) return no_box;
    return s;
  }

  template <class = Deferred>
  bool lies_in_long_runs(StoredBox const& stored) const {
    if (ranks_ == 1) return true;
    StoredForm const* const form = forms_ == nullptr ? nullptr : &(*forms_)[stored.tensor];
    std::uint32_t const t = form == nullptr ? stored.tensor : form->tensor;
    Extents const strides = row_major_strides(stored.box.shape);
    // Whether a rank's part of a tensor of the state does, of which `placed` is here.
    auto const long_runs = [&](std::uint32_t number, PlacedBox const* placed) {
      Layout const& layout = tensors_[number].layout;
      Box cell = box_at(layout, MeshGeometry::Coordinate{});
      std::int64_t const elements = cell.shape.elements();
      if (placed != nullptr) {
        for (int d = 0; d < cell.rank(); ++d) cell.shape[d] = std::min(cell.shape[d], placed->from.shape[d]);
        cell = {placed->at, permuted(cell.shape, placed->order)};
      }
      if (form != nullptr && form->recoded) cell = form->grid.owned(cell, shape_of(t), form->shape);
      std::int64_t run = 1;
      for (int d = cell.rank(); d-- > 0 && (cell.shape[d] == 1 || strides[d] == run);) run *= cell.shape[d];
      // A flat axis cuts on, where it pleases.
      if (int const axis = flat_axis(layout); axis >= 0) run = std::min(run, ceil_div(elements, std::max<std::int64_t>(1, flat_parts(layout, axis))));
      return bytes_of(dtype_of_stored(stored), run) >= options_.long_run_bytes;
    };
    if (arrangement_ == nullptr) return long_runs(t, nullptr);
    auto const& from = arrangement_->from[t].from;
    return std::all_of(from.begin(), from.end(), [&](PlacedBox const& placed) { return long_runs(placed.tensor, &placed); });
  }
  Extents const& shape_of(std::uint32_t t) const { return arrangement_ == nullptr ? tensors_[t].layout.shape : arrangement_->from[t].shape; }

  // Whether slots say who owns what of a file.
  bool in_slots(std::uint32_t file) const { return !slots_.empty() && files_.files[file].only_rank < 0; }
  // Whole blocks: a stripe need not divide 1 MiB.
  std::uint64_t segment_size() const { return round_up(options_.segment_bytes, options_.block_bytes); }
  std::int64_t segment_owner(std::uint32_t file, std::uint64_t position) const {
    return (static_cast<std::int64_t>(position / segment_size()) + static_cast<std::int64_t>(file)) % ranks_;
  }
  // How far from `at` the owner cannot change, within a run of this rank.
  template <class = Deferred>
  std::uint64_t end_of_same_owner(std::uint32_t file, std::uint64_t at, FileRange run) const {
    if (files_.files[file].only_rank >= 0) return run.end;
    if (in_slots(file)) return slots_.all()[slots_.at(file, at)].end;
    std::uint64_t const block = options_.block_bytes, block_begin = round_down(at, block);
    if (block_begin < run.begin || block_begin != at) return block_begin + block;   // the block starts with somebody else's byte, perhaps
    auto const s = stored_at(file, at);
    if (s == no_box) return run.end;                                                // this rank's header
    if (in_long_runs_[s]) return std::min(run.end, std::max(at + block, stored_range(s).end));
    std::uint64_t const segment = segment_size();
    return std::min(round_down(at, segment) + segment, std::max(at + block, round_up(stored_range(s).end, block)));
  }
  // The blocks that begin inside a stored box of short runs belong to the owners of its segments.
  template <class = Deferred>
  void own_segments(std::uint32_t file, FileRange stored, std::uint64_t begin, std::uint64_t end, std::vector<FileRange>& owned) const {
    std::uint64_t const block = options_.block_bytes, segment = segment_size(), size = files_.files[file].size;
    std::uint64_t const from = std::max(begin, round_up(stored.begin, block)), to = std::min(end, round_up(stored.end, block));
    for (std::uint64_t at = from; at < to;) {
      std::uint64_t const next = std::min(to, round_down(at, segment) + segment);
      if (segment_owner(file, at) == rank_ && at < size) owned.push_back({at, std::min(size, next)});
      at = next;
    }
  }

  std::vector<TensorSpec> const& tensors_;
  Shares const& shares_;
  FilePlan const& files_;
  std::vector<StoredForm> const* forms_;   // none: what is stored are the tensors
  Arrangement const* arrangement_;         // none: the tensors are the state's
  TransferIndex index_;
  ForwardingSlots slots_;              // none in jobs of few ranks
  std::vector<bool> in_long_runs_;     // of each stored box, there
  std::int64_t rank_, ranks_;
  Options options_;
  std::vector<std::unique_ptr<ElementSource>> sources_;
};

/// The files that ranks share, in windows of at most `bytes` bytes, in the order in which all ranks go through them: file by file where
/// every rank owns a part of every window; where ranks own slots, a window of each owner, then the next of each, so that all write at once.
///
/// Law       every byte of the shared files is in exactly one window
class SharedWindows {
 public:
  struct Window {
    std::uint32_t file;
    FileRange range;   // may be empty
  };

  template <class = Deferred>
  SharedWindows(std::vector<PlannedFile> const& files, ForwardingSlots const& slots, std::uint64_t bytes) : files_{files}, slots_{slots}, bytes_{bytes} {
    if (slots.empty()) {
      for (auto const& file : files) {
        before_.push_back(count_);
        if (file.only_rank < 0) count_ += ceil_div(file.size, bytes);
      }
      return;
    }
    std::uint64_t windows = 0, most = 0;
    for (auto const& slot : slots.all()) {
      before_.push_back(windows);
      windows += ceil_div(slot.end - slot.begin, bytes);
    }
    before_.push_back(windows);
    for (std::int64_t owner = 0; owner < slots.owners(); ++owner) {
      auto const [first, last] = slots.of_owner(owner);
      most = std::max(most, before_[last] - before_[first]);
    }
    count_ = most * static_cast<std::uint64_t>(slots.owners());
  }

  std::uint64_t size() const { return count_; }
  template <class = Deferred>
  Window operator[](std::uint64_t number) const {
    auto const in = [&](std::size_t first, std::size_t last, std::uint64_t window) {   // the file or slot that a window is in
      return static_cast<std::size_t>(std::upper_bound(before_.begin() + static_cast<std::ptrdiff_t>(first), before_.begin() + static_cast<std::ptrdiff_t>(last), window) - before_.begin()) - 1;
    };
    if (slots_.empty()) {
      std::size_t const f = in(0, before_.size(), number);
      std::uint64_t const begin = (number - before_[f]) * bytes_;
      return {static_cast<std::uint32_t>(f), {begin, std::min(begin + bytes_, files_[f].size)}};
    }
    auto const owners = static_cast<std::uint64_t>(slots_.owners());
    auto const [first, last] = slots_.of_owner(static_cast<std::int64_t>(number % owners));
    std::uint64_t const window = before_[first] + number / owners;
    if (window >= before_[last]) return {slots_.all()[first].file, {0, 0}};
    std::size_t const s = in(first, last, window);
    auto const& slot = slots_.all()[s];
    std::uint64_t const begin = slot.begin + (window - before_[s]) * bytes_;
    return {slot.file, {begin, std::min(begin + bytes_, slot.end)}};
  }

 private:
  std::vector<PlannedFile> const& files_;
  ForwardingSlots const& slots_;
  std::uint64_t bytes_, count_ = 0;
  std::vector<std::uint64_t> before_;   // windows before each file, or slot
};

}  // namespace dcp
