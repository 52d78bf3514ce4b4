// SPDX-License-Identifier: Apache-2.0
#pragma once
// One tensor of a state as codes and scales, made while they are written. Local: what ranks must tell each other of it goes in and out as
// bytes.
//
// A scale is that of a whole group of elements (a block, a row, the tensor), wherever its elements lie. A group that this rank holds all of is
// its own business. Of others every rank that holds some finds the largest magnitude of those, and the rank that writes the group's first
// element tells them all which is the largest. A stored element (a byte of two codes, a word, a block) is written by the rank that writes the first
// of the elements it holds; the others send it theirs.

#include <dcp/base/algorithms.hpp>
#include <dcp/base/config.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/core/cast.hpp>
#include <dcp/core/encoding.hpp>
#include <dcp/formats/block_kernels.hpp>
#include <dcp/formats/block_quantizers.hpp>
#include <dcp/plan/catalog.hpp>
#include <dcp/plan/save_plan.hpp>
#include <dcp/plan/transfer.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace dcp {

namespace detail {

/// What this rank holds of a tensor, as floats.
class HeldElements {
 public:
  struct Held {
    Box box;
    MemoryView memory;   // of its first element
  };

  HeldElements(std::string name, DType dtype, Extents const& shape) : name_{std::move(name)}, dtype_{dtype}, shape_{shape}, strides_{row_major_strides(shape)} {}

  std::string const& name() const { return name_; }
  DType dtype() const { return dtype_; }
  Extents const& shape() const { return shape_; }
  Extents const& strides() const { return strides_; }
  std::vector<Held> const& held() const { return held_; }

  /// source    that they come from instead of memory
  void hold(std::vector<Held> held, std::shared_ptr<TensorSource const> source = nullptr) {
    held_ = std::move(held);
    source_ = std::move(source);
    others_.clear();
  }
  /// An element that another rank has sent.
  void add(std::int64_t element, float value) { others_[element] = value; }

  /// Whether all of `box` is in one of the boxes held.
  template <class = Deferred>
  bool holds(Box const& box) const {
    return std::any_of(held_.begin(), held_.end(), [&](Held const& held) {
      for (int d = 0; d < box.rank(); ++d)
        if (box.origin[d] < held.box.origin[d] || box.origin[d] + box.shape[d] > held.box.origin[d] + held.box.shape[d]) return false;
      return true;
    });
  }

  /// `count` elements along the last dimension from `index` on.
  template <class = Deferred>
  void read(Extents const& index, std::int64_t count, float* out) const {
    int const last = shape_.rank() - 1;
    Extents at = index;
    for (std::int64_t done = 0; done < count;) {
      std::int64_t run = 0;
      for (auto const& [box, memory] : held_) {
        bool inside = !box.empty();
        std::int64_t offset = 0;
        for (int d = 0; d <= last && inside; ++d) {
          inside = at[d] >= box.origin[d] && at[d] < box.origin[d] + box.shape[d];
          offset += (at[d] - box.origin[d]) * memory.strides[d];
        }
        if (!inside) continue;
        run = last < 0 ? 1 : std::min(count - done, box.origin[last] + box.shape[last] - at[last]);
        if (source_ != nullptr) {
          Box piece{at, Extents::filled(last + 1, 1)};
          if (last >= 0) piece.shape[last] = run;
          Bytes bytes(static_cast<std::size_t>(run * (bits_of(dtype_) / 8)));
          source_->read(piece, bytes.data());
          load(bytes.data(), 1, run, out + done);
          break;
        }
        load(memory.data + offset * (bits_of(dtype_) / 8), last < 0 ? 1 : memory.strides[last], run, out + done);
        break;
      }
      if (run == 0) {
        auto const found = others_.find(element_of(at));
        if (found == others_.end()) throw Error{ErrorCode::incomplete, name_ + ": nobody has sent element " + to_string(at)};
        out[done] = found->second;
        run = 1;
      }
      done += run;
      if (last >= 0) at[last] += run;
    }
  }
  template <class = Deferred>
  std::int64_t element_of(Extents const& index) const {
    std::int64_t element = 0;
    for (int d = 0; d < shape_.rank(); ++d) element += index[d] * strides_[d];
    return element;
  }
  /// Throws Error(invalid_argument) for the first element of a run that is NaN or infinite.
  template <class = Deferred>
  [[noreturn]] void refuse(Extents index, float const* values, std::int64_t count) const {
    std::int64_t i = 0;
    while (i + 1 < count && std::isfinite(values[i])) ++i;
    if (shape_.rank() > 0) index[shape_.rank() - 1] += i;
    throw Error{ErrorCode::invalid_argument, name_ + ": element " + to_string(index) + " is " + (std::isnan(values[i]) ? "NaN" : "infinite") + ", which cannot be quantized"};
  }

 private:
  void load(std::byte const* from, std::int64_t stride, std::int64_t count, float* out) const {
    auto const n = static_cast<std::size_t>(count);
    if (stride != 1 && count > 1) {
      for (std::int64_t i = 0; i < count; ++i) load(from + i * stride * (bits_of(dtype_) / 8), 1, 1, out + i);
    } else if (dtype_ == DType::f32) {
      std::memcpy(out, from, n * sizeof(float));
    } else if (dtype_ == DType::bf16) {
      block_kernels().from_bf16(from, n, out);
    } else if (dtype_ == DType::f16) {
      block_kernels().from_f16(from, n, out);
    } else {
      cast_elements(dtype_, from, DType::f32, reinterpret_cast<std::byte*>(out), n);
    }
  }

  std::string name_;
  DType dtype_;
  Extents shape_, strides_;
  std::vector<Held> held_;
  std::shared_ptr<TensorSource const> source_;
  std::map<std::int64_t, float> others_;
};

/// A tensor that is encoded when it is saved: what it is stored as, and the bytes of that.
class Quantizer {
 public:
  Quantizer(std::string name, DType dtype, Extents const& shape, std::vector<EncodedPart> parts) : elements_{std::move(name), dtype, shape}, parts_{std::move(parts)} {}
  virtual ~Quantizer() = default;
  Quantizer(Quantizer const&) = delete;
  Quantizer& operator=(Quantizer const&) = delete;

  std::vector<EncodedPart> const& parts() const { return parts_; }
  HeldElements& elements() { return elements_; }
  HeldElements const& elements() const { return elements_; }

  // ---- before every save: prepare() with local memory bound; its messages to the ranks named, theirs to take(); answers back to learn().

  /// Units of work of prepare_unit(), which several threads may do at once after begin().
  virtual void begin() {}
  virtual std::vector<Box> units() const { return {}; }
  virtual void prepare_unit(Box const&) {}
  /// What others must know. `owner_of(index)`: the rank that writes an element. `send(rank)`: where to write what goes to it.
  virtual void tell(std::function<std::int64_t(Extents const&)> const& owner_of, std::int64_t rank, std::function<ByteWriter&(std::int64_t)> const& send) = 0;
  /// Takes one record of tell() that rank `from` has sent, or this rank itself.
  virtual void take(ByteReader& in, std::int64_t from) = 0;
  /// After all have been taken: the answers.
  virtual void answer(std::function<ByteWriter&(std::int64_t)> const& send) = 0;
  virtual void learn(ByteReader& in) = 0;

  /// Elements [first, first + count) of `box` of a part, in row-major order of the box.
  virtual void produce(std::size_t part, Box const& box, std::int64_t first, std::int64_t count, std::byte* out) const = 0;

 protected:
  /// Calls visit(index) for the elements of a held box that belong to a stored element of `grid` whose first element lies outside of the box, so that
  /// somebody else may write it.
  template <class Visit>
  void for_each_at_edge(PartGrid const& grid, Visit visit) const {
    for (auto const& held : elements_.held()) {
      if (held.box.empty()) continue;
      Box const owned = grid.owned(held.box, elements_.shape(), Extents::filled(static_cast<int>(grid.axes.size()), INT64_MAX / 2));
      Box inner = held.box;   // of the elements whose stored element begins in the box
      for (std::size_t d = 0; d < grid.axes.size(); ++d)
        if (auto const [dim, each] = grid.axes[d]; dim >= 0) {
          std::int64_t const begin = std::min(held.box.origin[dim] + held.box.shape[dim], owned.origin[static_cast<int>(d)] * each);
          inner.shape[dim] -= begin - inner.origin[dim];
          inner.origin[dim] = begin;
        }
      std::vector<Box> edges;
      subtract(held.box, inner, edges);
      for (auto const& edge : edges) for_each_index(edge, edge.rank(), visit);
    }
  }
  /// The values at the edges, to the ranks that write the elements they are stored in.
  template <class = Deferred>
  void tell_edges(PartGrid const& grid, std::function<std::int64_t(Extents const&)> const& owner_of, std::int64_t rank, std::function<ByteWriter&(std::int64_t)> const& send) const {
    for_each_at_edge(grid, [&](Extents const& index) {
      std::int64_t const owner = owner_of(first_of_stored(grid, index));
      if (owner == rank) return;
      float value = 0;
      elements_.read(index, 1, &value);
      send(owner).number(std::uint8_t{1}).number(elements_.element_of(index)).number(value);
    });
  }
  /// The first element that is stored together with this one.
  static Extents first_of_stored(PartGrid const& grid, Extents const& index) {
    Extents first = index;
    for (auto const& axis : grid.axes)
      if (axis.dim >= 0) first[axis.dim] = index[axis.dim] / axis.each * axis.each;
    return first;
  }
  void take_edge(ByteReader& in) {
    auto const element = in.number<std::int64_t>();
    elements_.add(element, in.number<float>());
  }

  HeldElements elements_;

 private:
  std::vector<EncodedPart> parts_;
};

/// How a GroupQuantizer's elements become codes.
enum class CodeForm : std::uint8_t { e4m3, i8, e2m1, int4 };
/// How its codes are packed.
enum class CodePacking : std::uint8_t { bytes, nibbles, transposed_words };
/// What its scales are stored as.
enum class ScaleForm : std::uint8_t { f32, f16, e8m0, e4m3_of_tensor };
/// A part that is the same whatever the elements are.
enum class ConstantForm : std::uint8_t { none, shape_i64, group_index, zero_points };

struct GroupQuantizerSpec {
  std::string name;                 // of the tensor
  DType dtype{};
  Extents shape;
  CodeForm code{};
  CodePacking packing{};
  ScaleForm scale{};
  std::vector<std::int64_t> group;  // elements of a group along each dimension
  EncodedPart codes, scales;
  std::vector<std::pair<EncodedPart, ConstantForm>> constants{};
  bool tensor_scale = false;        // NVFP4: the first constant part is the tensor's own scale
};

/// Codes of a fixed width with a scale for every group.
template <class D = Deferred>
class GroupQuantizer final : public Quantizer {
 public:
  explicit GroupQuantizer(GroupQuantizerSpec const& spec) : Quantizer{spec.name, spec.dtype, spec.shape, parts_of(spec)}, spec_{spec} {
    int const rank = spec.shape.rank();
    groups_ = spec.shape;
    for (int d = 0; d < rank; ++d) groups_[d] = ceil_div(spec.shape[d], spec.group[static_cast<std::size_t>(d)]);
    group_strides_ = row_major_strides(groups_);
    // Groups inside a row are looked at again when they are written, which is once for each. Of others the largest magnitude is remembered.
    std::int64_t rows_of_group = 1;
    for (int d = 0; d + 1 < rank; ++d) rows_of_group *= spec.group[static_cast<std::size_t>(d)];
    in_rows_ = rows_of_group == 1 && rank > 0 && spec.group[static_cast<std::size_t>(rank - 1)] <= 1024 && spec.packing != CodePacking::transposed_words;
  }

  void begin() override {
    known_.clear();
    shared_.clear();
    tensor_amax_ = whole_amax_ = 0;
    heard_.clear();
    tables_.clear();
    if (in_rows_) return;
    for (auto const& held : elements_.held()) {
      Table table{groups_of(held.box), {}};
      table.largest.assign(static_cast<std::size_t>(held.box.empty() ? 0 : table.box.shape.elements()), 0.0f);
      tables_.push_back(std::move(table));
    }
  }

  std::vector<Box> units() const override {
    std::vector<Box> boxes;
    if (in_rows_ && !spec_.tensor_scale) return boxes;
    constexpr std::int64_t most = 1 << 20;
    int const rank = spec_.shape.rank();
    for (auto const& held : elements_.held()) {
      if (held.box.empty()) continue;
      // Cut along the first dimension that is longer than a group, on groups.
      int d = 0;
      while (d + 1 < rank && held.box.shape[d] <= spec_.group[static_cast<std::size_t>(d)]) ++d;
      std::int64_t const group = spec_.group[static_cast<std::size_t>(d)], slice = held.box.shape.elements() / held.box.shape[d];
      std::int64_t const step = std::max<std::int64_t>(1, most / std::max<std::int64_t>(1, slice * group)) * group;
      for (std::int64_t at = held.box.origin[d], end = at + held.box.shape[d]; at < end;) {
        Box box = held.box;
        box.origin[d] = at;
        box.shape[d] = std::min(end, (at / group * group) + step) - at;
        at += box.shape[d];
        boxes.push_back(std::move(box));
      }
    }
    return boxes;
  }

  void prepare_unit(Box const& box) override {
    StandardArithmetic const standard;
    Box const groups = groups_of(box);
    std::vector<float> largest(static_cast<std::size_t>(groups.shape.elements()), 0.0f);
    Extents const strides = row_major_strides(groups.shape);
    int const last = box.rank() - 1;
    std::int64_t const each = spec_.group[static_cast<std::size_t>(last)];
    float all = 0;
    for_each_row_piece(box, [&](Extents const& index, std::int64_t count, float const* values) {
      std::int64_t at = 0;
      for (int d = 0; d < last; ++d) at += (index[d] / spec_.group[static_cast<std::size_t>(d)] - groups.origin[d]) * strides[d];
      for (std::int64_t c = index[last], end = c + count; c < end;) {
        std::int64_t const stop = std::min(end, (c / each + 1) * each);
        float& group = in_rows_ ? all : largest[static_cast<std::size_t>(at + c / each - groups.origin[last])];
        if (!quantize::absolute_maximum(values + (c - index[last]), static_cast<std::size_t>(stop - c), group)) elements_.refuse(index, values, count);
        c = stop;
      }
    });
    std::lock_guard const lock{mutex_};
    if (in_rows_) {
      tensor_amax_ = std::max(tensor_amax_, all);
      return;
    }
    for (auto const value : largest) tensor_amax_ = std::max(tensor_amax_, value);
    for (auto& table : tables_) {
      Box common;
      if (!intersect(table.box, groups, common)) continue;
      Extents const to_strides = row_major_strides(table.box.shape);
      dcp::for_each_run(common.shape, to_strides, strides, 0, common.shape.elements(), [&](std::int64_t, std::int64_t to, std::int64_t from, std::int64_t count) {
        std::int64_t to_base = 0, from_base = 0;
        for (int d = 0; d < common.rank(); ++d) to_base += (common.origin[d] - table.box.origin[d]) * to_strides[d], from_base += (common.origin[d] - groups.origin[d]) * strides[d];
        for (std::int64_t i = 0; i < count; ++i) {
          float& mine = table.largest[static_cast<std::size_t>(to_base + to + i)];
          mine = std::max(mine, largest[static_cast<std::size_t>(from_base + from + i)]);
        }
      });
    }
  }

  void tell(std::function<std::int64_t(Extents const&)> const& owner_of, std::int64_t rank, std::function<ByteWriter&(std::int64_t)> const& send) override {
    if (spec_.tensor_scale && !elements_.held().empty() && std::any_of(elements_.held().begin(), elements_.held().end(), [](auto const& held) { return !held.box.empty(); })) {
      if (!elements_.holds(Box::whole(spec_.shape))) send(owner_of(Extents::filled(spec_.shape.rank(), 0))).number(std::uint8_t{0}).number(std::int64_t{-1}).number(tensor_amax_);
      else whole_amax_ = tensor_amax_;
    }
    // Groups that reach out of what is held.
    std::map<std::int64_t, float> partial;
    for (std::size_t h = 0; h < elements_.held().size(); ++h) {
      Box const& box = elements_.held()[h].box;
      if (box.empty()) continue;
      Box const groups = groups_of(box);
      for_each_group_at_edge(box, groups, [&](Extents const& group) {
        Box const of_group = elements_of_group(group);
        if (elements_.holds(of_group)) return;
        float& largest = partial[number_of(group)];
        if (in_rows_) {
          Box part;
          if (intersect(of_group, box, part)) largest = std::max(largest, largest_in(part));
        } else {
          largest = std::max(largest, tables_[h].at(group));
        }
      });
    }
    for (auto const& [number, largest] : partial) send(owner_of(first_of(number))).number(std::uint8_t{0}).number(number).number(largest);
    tell_edges(spec_.codes.grid, owner_of, rank, send);
    // Where a word begins in one group and ends in another, its writer may hold nothing of the other.
    std::map<std::int64_t, std::int64_t> told;
    for_each_at_edge(spec_.codes.grid, [&](Extents const& index) {
      Extents const first = first_of_stored(spec_.codes.grid, index), group = group_with(index);
      std::int64_t const number = number_of(group);
      if (number_of(group_with(first)) == number) return;
      std::int64_t const writer = owner_of(first);
      if (writer == rank || !told.try_emplace(number, writer).second) return;
      auto const found = partial.find(number);
      send(owner_of(first_of(number))).number(std::uint8_t{2}).number(number).number(found == partial.end() ? largest_of(group) : found->second).number(writer);
    });
  }
  void take(ByteReader& in, std::int64_t from) override {
    auto const kind = in.number<std::uint8_t>();
    if (kind == 1) return take_edge(in);
    auto const number = in.number<std::int64_t>();
    float& largest = shared_.try_emplace(number, 0.0f).first->second;
    largest = std::max(largest, in.number<float>());
    heard_.emplace_back(number, kind == 2 ? in.number<std::int64_t>() : from);
  }
  void answer(std::function<ByteWriter&(std::int64_t)> const& send) override {
    std::sort(heard_.begin(), heard_.end());
    heard_.erase(std::unique(heard_.begin(), heard_.end()), heard_.end());
    for (auto const& [number, from] : heard_) send(from).number(number).number(shared_.at(number));
    heard_.clear();
    shared_.clear();
  }
  void learn(ByteReader& in) override {
    auto const number = in.number<std::int64_t>();
    auto const largest = in.number<float>();
    if (number < 0) whole_amax_ = largest;
    else known_[number] = largest;
  }

  void produce(std::size_t part, Box const& box, std::int64_t first, std::int64_t count, std::byte* out) const override {
    StandardArithmetic const standard;
    if (part == 0) return spec_.packing == CodePacking::transposed_words ? produce_words(box, first, count, out) : produce_codes(box, first, count, out);
    if (part == 1) return produce_scales(box, first, count, out);
    produce_constant(part - 2, box, first, count, out);
  }

 private:
  // The largest magnitudes of the groups that a held box touches.
  struct Table {
    Box box;
    std::vector<float> largest;

    float at(Extents const& group) const {
      std::int64_t number = 0;
      for (int d = 0; d < group.rank(); ++d) number = number * box.shape[d] + (group[d] - box.origin[d]);
      return largest[static_cast<std::size_t>(number)];
    }
    bool has(Extents const& group) const {
      for (int d = 0; d < group.rank(); ++d)
        if (group[d] < box.origin[d] || group[d] >= box.origin[d] + box.shape[d]) return false;
      return true;
    }
  };

  static std::vector<EncodedPart> parts_of(GroupQuantizerSpec const& spec) {
    std::vector<EncodedPart> parts;
    parts.push_back(spec.codes);
    parts.push_back(spec.scales);
    for (auto const& [part, form] : spec.constants) parts.push_back(part);
    return parts;
  }

  // ---- groups

  Box groups_of(Box const& box) const {
    Box groups = box;
    for (int d = 0; d < box.rank(); ++d) {
      std::int64_t const each = spec_.group[static_cast<std::size_t>(d)];
      groups.origin[d] = box.origin[d] / each;
      groups.shape[d] = ceil_div(box.origin[d] + box.shape[d], each) - groups.origin[d];
    }
    return groups;
  }
  Box elements_of_group(Extents const& group) const {
    Box box = Box::whole(spec_.shape);
    for (int d = 0; d < group.rank(); ++d) {
      std::int64_t const each = spec_.group[static_cast<std::size_t>(d)];
      box.origin[d] = group[d] * each;
      box.shape[d] = std::min(each, spec_.shape[d] - box.origin[d]);
    }
    return box;
  }
  Extents group_with(Extents index) const {
    for (int d = 0; d < index.rank(); ++d) index[d] /= spec_.group[static_cast<std::size_t>(d)];
    return index;
  }
  std::int64_t number_of(Extents const& group) const {
    std::int64_t number = 0;
    for (int d = 0; d < group.rank(); ++d) number += group[d] * group_strides_[d];
    return number;
  }
  Extents first_of(std::int64_t number) const {
    Extents index = spec_.shape;
    for (int d = 0; d < index.rank(); ++d) {
      index[d] = number / group_strides_[d] * spec_.group[static_cast<std::size_t>(d)];
      number %= group_strides_[d];
    }
    return index;
  }
  // Calls visit(group) for the groups that reach out of a box, some perhaps more than once.
  template <class Visit>
  void for_each_group_at_edge(Box const& box, Box const& groups, Visit visit) const {
    for (int d = 0; d < box.rank(); ++d) {
      std::int64_t const each = spec_.group[static_cast<std::size_t>(d)], begin = box.origin[d], end = begin + box.shape[d];
      auto const slab = [&](std::int64_t at) {
        Box edge = groups;
        edge.origin[d] = at;
        edge.shape[d] = 1;
        for_each_index(edge, edge.rank(), visit);
      };
      bool const low = begin % each != 0, high = end % each != 0 && end != spec_.shape[d];
      if (low) slab(begin / each);
      if (high && !(low && begin / each == (end - 1) / each)) slab((end - 1) / each);
    }
  }

  // Calls visit(index, count, values) for pieces of the rows of a box, whole groups where they are inside rows.
  template <class Visit>
  void for_each_row_piece(Box const& box, Visit visit) const {
    int const last = box.rank() - 1;
    constexpr std::int64_t piece = 4096;
    std::vector<float> values(static_cast<std::size_t>(std::min(piece, box.shape[last])));
    for_each_index(box, last, [&](Extents const& row) {
      for (std::int64_t done = 0; done < box.shape[last]; done += piece) {
        std::int64_t const count = std::min(piece, box.shape[last] - done);
        Extents at = row;
        at[last] += done;
        elements_.read(at, count, values.data());
        visit(at, count, values.data());
      }
    });
  }
  float largest_in(Box const& box) const {
    float largest = 0;
    for_each_row_piece(box, [&](Extents const& index, std::int64_t count, float const* values) {
      if (!quantize::absolute_maximum(values, static_cast<std::size_t>(count), largest)) elements_.refuse(index, values, count);
    });
    return largest;
  }
  float largest_of(Extents const& group) const {
    if (!known_.empty())
      if (auto const found = known_.find(number_of(group)); found != known_.end()) return found->second;
    if (in_rows_) return largest_in(elements_of_group(group));
    for (auto const& table : tables_)
      if (table.has(group)) return table.at(group);
    throw Error{ErrorCode::incomplete, spec_.name + ": nobody has said what is largest in the group " + to_string(group)};
  }
  float tensor_scale() const {
    if (!spec_.tensor_scale) return 1;
    return quantize::nvfp4_tensor_scale(whole_amax_);
  }

  // What codes are divided by, of a group with this largest magnitude. `of_tensor`: tensor_scale(), where there is one.
  float step_of(float largest, float of_tensor) const {
    switch (spec_.scale) {
      case ScaleForm::e8m0: return static_cast<float>(f8_e8m0::from_bits(e8m0_of(largest)));
      case ScaleForm::e4m3_of_tensor: return quantize::nvfp4_step(quantize::nvfp4_block_scale(largest, of_tensor), of_tensor);
      case ScaleForm::f16: return half_scale(largest);
      case ScaleForm::f32: break;
    }
    if (spec_.code == CodeForm::e4m3) return quantize::e4m3_scale(largest);
    return quantize::int_scale(largest, spec_.code == CodeForm::int4 ? 4 : 8);
  }
  std::uint8_t e8m0_of(float largest) const { return spec_.code == CodeForm::e2m1 ? quantize::e2m1_scale_code(largest) : quantize::mxfp8_scale_code(largest); }
  float half_scale(float largest) const {
    float const scale = quantize::rounded_to_f16_up(quantize::int_scale(largest, 4));
    if (!std::isfinite(scale)) throw Error{ErrorCode::invalid_argument, spec_.name + ": its elements reach " + std::to_string(largest) + ", too large for scales in half precision"};
    return scale;
  }

  // Codes of one group, a byte each; of integers of four bits with 8 added.
  void encode(float const* values, std::size_t count, float step, std::uint8_t* codes) const {
    switch (spec_.code) {
      case CodeForm::e4m3: return quantize::to_e4m3(values, count, step, codes);
      case CodeForm::e2m1: return quantize::to_e2m1(values, count, step, codes);
      case CodeForm::i8: return quantize::to_int(values, count, step, -128, 127, reinterpret_cast<std::int8_t*>(codes));
      case CodeForm::int4:
        quantize::to_int(values, count, step, -8, 7, reinterpret_cast<std::int8_t*>(codes));
        for (std::size_t i = 0; i < count; ++i) codes[i] = static_cast<std::uint8_t>(codes[i] + 8u);
    }
  }

  // ---- parts

  // Bytes of rows: a code each, or two.
  void produce_codes(Box const& box, std::int64_t first, std::int64_t count, std::byte* out) const {
    int const rank = spec_.shape.rank(), last = rank - 1;
    std::int64_t const unit = bits_of(spec_.codes.dtype) / 8, per_byte = spec_.packing == CodePacking::nibbles ? 2 : 1;
    // Of the box: bytes of a row, whatever dimensions of the part they are in.
    std::int64_t row_bytes = unit;
    for (int d = last; d < box.rank(); ++d) row_bytes *= box.shape[d];
    std::int64_t inner = unit;
    for (int d = last + 1; d < box.rank(); ++d) inner *= box.shape[d];
    for (std::int64_t at = first * unit, end = (first + count) * unit; at < end;) {
      std::int64_t const row = at / row_bytes, begin = at % row_bytes, stop = std::min(row_bytes, begin + (end - at));
      Extents index = Extents::filled(rank, 0);
      std::int64_t rest = row;
      for (int d = last; d-- > 0;) {
        index[d] = box.origin[d] + rest % box.shape[d];
        rest /= box.shape[d];
      }
      std::int64_t const origin = box.origin[last] * inner;   // of the row's first byte in the box
      row_codes(index, (origin + begin) * per_byte, (origin + stop) * per_byte, out);
      out += stop - begin;
      at += stop - begin;
    }
  }
  // The bytes of columns [begin, end) of a row, of which those beyond the last column are 0.
  void row_codes(Extents index, std::int64_t begin, std::int64_t end, std::byte* out) const {
    int const last = spec_.shape.rank() - 1;
    std::int64_t const each = spec_.group[static_cast<std::size_t>(last)], columns = spec_.shape[last];
    bool const nibbles = spec_.packing == CodePacking::nibbles;
    float const of_tensor = tensor_scale();
    constexpr std::int64_t piece = 2048;
    std::array<float, 2048> values;
    std::array<std::uint8_t, 2048> codes;
    for (std::int64_t at = begin; at < end;) {
      std::int64_t const stop = std::min(end, at + piece), real = std::max<std::int64_t>(0, std::min(stop, columns) - at);
      index[last] = at;
      if (real > 0) elements_.read(index, real, values.data());
      Extents group = group_with(index);
      for (std::int64_t c = at; c < at + real;) {
        std::int64_t const next = std::min(at + real, (c / each + 1) * each);
        group[last] = c / each;
        float largest = 0;
        // The whole group is here, and no other rank has any of it: no need to look for it.
        bool const whole = in_rows_ && known_.empty() && c % each == 0 && (next == c + each || next == columns);
        if (!whole) largest = largest_of(group);
        else if (!quantize::absolute_maximum(values.data() + (c - at), static_cast<std::size_t>(next - c), largest)) elements_.refuse(index, values.data(), real);
        encode(values.data() + (c - at), static_cast<std::size_t>(next - c), step_of(largest, of_tensor), codes.data() + (c - at));
        c = next;
      }
      std::fill(codes.begin() + real, codes.begin() + (stop - at), std::uint8_t{0});
      auto* const to = reinterpret_cast<std::uint8_t*>(out);
      if (nibbles) quantize::pack_nibbles(codes.data(), static_cast<std::size_t>((stop - at) / 2), to);
      else std::memcpy(to, codes.data(), static_cast<std::size_t>(stop - at));
      out += nibbles ? (stop - at) / 2 : stop - at;
      at = stop;
    }
  }
  // Words of eight inputs of one output, [inputs / 8, outputs].
  void produce_words(Box const& box, std::int64_t first, std::int64_t count, std::byte* out) const {
    std::int64_t const each = spec_.group[1];
    std::array<float, 8> values;
    std::array<std::uint8_t, 8> codes;
    for (std::int64_t i = first; i < first + count; ++i, out += 4) {
      std::int64_t const n = box.origin[1] + i % box.shape[1], k = (box.origin[0] + i / box.shape[1]) * 8;
      elements_.read(Extents{n, k}, 8, values.data());
      for (std::int64_t c = 0; c < 8;) {
        std::int64_t const next = std::min<std::int64_t>(8, (k + c) / each * each + each - k);
        encode(values.data() + c, static_cast<std::size_t>(next - c), step_of(largest_of(Extents{n, (k + c) / each}), 1), codes.data() + c);
        c = next;
      }
      std::uint32_t word = 0;
      for (std::size_t c = 0; c < 8; ++c) word |= static_cast<std::uint32_t>(codes[c]) << (4 * c);
      std::memcpy(out, &word, 4);
    }
  }
  void produce_scales(Box const& box, std::int64_t first, std::int64_t count, std::byte* out) const {
    std::size_t const width = static_cast<std::size_t>(bits_of(spec_.scales.dtype) / 8);
    float const of_tensor = tensor_scale();
    // Groups in rows that are this rank's own are looked at many at once.
    int const last = spec_.shape.rank() - 1;
    bool const many = in_rows_ && known_.empty() && box.rank() == last + 1 && spec_.scales.grid.axes.back().dim == last;
    std::vector<float> values(many ? 4096 : 0);
    for (std::int64_t i = first, end = first + count; i < end;) {
      Extents index = box.origin;
      std::int64_t rest = i;
      for (int d = box.rank(); d-- > 0;) {
        index[d] = box.origin[d] + rest % box.shape[d];
        rest /= box.shape[d];
      }
      Extents const element = spec_.scales.grid.first_element(index, spec_.shape);
      if (!many) {
        store_scale(largest_of(group_with(element)), of_tensor, out);
        out += width;
        ++i;
        continue;
      }
      std::int64_t const each = spec_.group[static_cast<std::size_t>(last)], in_row = box.origin[last] + box.shape[last] - index[last];
      std::int64_t const groups = std::min({end - i, in_row, static_cast<std::int64_t>(values.size()) / each});
      std::int64_t const columns = std::min(groups * each, spec_.shape[last] - element[last]);
      elements_.read(element, columns, values.data());
      for (std::int64_t g = 0; g < groups; ++g, out += width) {
        float largest = 0;
        if (!quantize::absolute_maximum(values.data() + g * each, static_cast<std::size_t>(std::min(each, columns - g * each)), largest)) elements_.refuse(element, values.data(), columns);
        store_scale(largest, of_tensor, out);
      }
      i += groups;
    }
  }
  void store_scale(float largest, float of_tensor, std::byte* out) const {
    switch (spec_.scale) {
      case ScaleForm::e8m0: *out = static_cast<std::byte>(e8m0_of(largest)); break;
      case ScaleForm::e4m3_of_tensor: *out = static_cast<std::byte>(quantize::nvfp4_block_scale(largest, of_tensor)); break;
      case ScaleForm::f16: {
        auto const half = f16{half_scale(largest)}.bits();
        std::memcpy(out, &half, 2);
        break;
      }
      case ScaleForm::f32: {
        float const scale = step_of(largest, of_tensor);
        std::memcpy(out, &scale, 4);
      }
    }
  }
  void produce_constant(std::size_t which, Box const& box, std::int64_t first, std::int64_t count, std::byte* out) const {
    auto const& [part, form] = spec_.constants[which];
    for (std::int64_t i = first; i < first + count; ++i) {
      std::int64_t const at = (box.rank() == 0 ? 0 : box.origin[box.rank() - 1]) + i;
      if (form == ConstantForm::none) {
        float const scale = tensor_scale();
        std::memcpy(out, &scale, 4), out += 4;
      } else if (form == ConstantForm::shape_i64) {
        std::int64_t const size = spec_.shape[static_cast<int>(at)];
        std::memcpy(out, &size, 8), out += 8;
      } else if (form == ConstantForm::group_index) {
        auto const group = static_cast<std::int32_t>(at / spec_.group[1]);
        std::memcpy(out, &group, 4), out += 4;
      } else {
        std::uint32_t const word = 0x77777777u;   // eight zero points of 8, one less each
        std::memcpy(out, &word, 4), out += 4;
      }
    }
  }

  GroupQuantizerSpec spec_;
  Extents groups_, group_strides_;
  bool in_rows_ = false;
  Mutex mutex_;
  float tensor_amax_ = 0, whole_amax_ = 0;                      // of what is held; of the tensor
  std::vector<Table> tables_;                                   // of each held box
  std::map<std::int64_t, float> known_;                         // groups that other ranks have elements of, too: their largest magnitudes
  std::map<std::int64_t, float> shared_;                        // those that this rank answers for
  std::vector<std::pair<std::int64_t, std::int64_t>> heard_;    // group, rank
};

}  // namespace detail
}  // namespace dcp
