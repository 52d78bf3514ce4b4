// SPDX-License-Identifier: Apache-2.0
#include <dcp/ext/eigen.hpp>

#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/owned_state.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/safetensors.hpp>

#include <doctest/doctest.h>

#include <concepts>
#include <cstring>
#include <mutex>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace {

using Eigen::Dynamic;
using RowMatrix = Eigen::Matrix<float, Dynamic, Dynamic, Eigen::RowMajor>;
using InMemory = dcp::BasicSafeTensors<dcp::Memory>;

struct Box2 {
  std::int64_t rows, cols;
};

// What a reader that knows nothing of Eigen finds under `name`: shape, and elements rows first.
template <class T>
std::pair<dcp::Extents, std::vector<T>> stored(dcp::Memory const& medium, std::string const& name) {
  dcp::SelfComm self;
  auto const state = dcp::load_from_keys<InMemory>(self, {medium, "ckpt"}, {name});
  auto const& tensor = state.tensors().at(name);
  std::vector<T> elements(tensor.bytes().size() / sizeof(T));
  if (!elements.empty()) std::memcpy(elements.data(), tensor.bytes().data(), tensor.bytes().size());
  return {tensor.shape(), elements};
}

void save(dcp::Memory const& medium, dcp::StateDict const& state) {
  dcp::SelfComm self;
  dcp::save<InMemory>(self, {medium, "ckpt"}, state, {.if_exists = dcp::IfExists::replace});
}
dcp::Report load(dcp::Memory const& medium, dcp::StateDict const& state) {
  dcp::SelfComm self;
  return dcp::load<InMemory>(self, {medium, "ckpt"}, state);
}

RowMatrix counted(Eigen::Index rows, Eigen::Index cols) {
  RowMatrix m(rows, cols);
  for (Eigen::Index i = 0; i < rows; ++i)
    for (Eigen::Index j = 0; j < cols; ++j) m(i, j) = static_cast<float>(100 * i + j);
  return m;
}

}  // namespace

TEST_CASE("an Eigen type is an entry; nothing else becomes one") {
  CHECK(dcp::detail::HasEntryOf<RowMatrix>);
  CHECK(dcp::detail::HasEntryOf<Eigen::Map<Eigen::VectorXd>>);
  CHECK(dcp::detail::HasEntryOf<Eigen::Ref<Eigen::ArrayXi>>);
  CHECK_FALSE(dcp::detail::HasEntryOf<std::string>);
  CHECK_FALSE(dcp::detail::HasEntryOf<float>);
  CHECK_FALSE(dcp::detail::HasEntryOf<float*>);
  CHECK_FALSE(dcp::detail::HasEntryOf<Eigen::Stride<1, 1>>);
  CHECK_FALSE(dcp::EntryOf<RowMatrix>::is_view);
  CHECK_FALSE(dcp::EntryOf<Eigen::Array3f>::is_view);
  CHECK(dcp::EntryOf<Eigen::Map<RowMatrix>>::is_view);
  CHECK(dcp::EntryOf<decltype(std::declval<RowMatrix&>().topRows(1))>::is_view);
}

TEST_CASE("matrices are stored rows first under their shape, vectors with one dimension") {
  dcp::Memory medium;
  RowMatrix matrix = counted(2, 3);
  Eigen::VectorXd column(3);
  column << 1, 2, 3;
  Eigen::RowVectorXi row(2);
  row << 4, 5;
  Eigen::Array<std::int64_t, 2, 2, Eigen::RowMajor> array;
  array << 1, 2, 3, 4;
  Eigen::Matrix<bool, 2, 1> flags{true, false};
  Eigen::Matrix<std::complex<float>, 1, 1> one;
  one << std::complex<float>{1, -2};
  save(medium, {{"matrix", matrix}, {"column", column}, {"row", row}, {"array", array}, {"flags", flags}, {"one", one}});

  CHECK(stored<float>(medium, "matrix") == std::pair{dcp::Extents{2, 3}, std::vector<float>{0, 1, 2, 100, 101, 102}});
  CHECK(stored<double>(medium, "column") == std::pair{dcp::Extents{3}, std::vector<double>{1, 2, 3}});
  CHECK(stored<int>(medium, "row") == std::pair{dcp::Extents{2}, std::vector<int>{4, 5}});
  CHECK(stored<std::int64_t>(medium, "array") == std::pair{dcp::Extents{2, 2}, std::vector<std::int64_t>{1, 2, 3, 4}});
  CHECK(stored<std::uint8_t>(medium, "flags") == std::pair{dcp::Extents{2}, std::vector<std::uint8_t>{1, 0}});
  CHECK(stored<std::complex<float>>(medium, "one") == std::pair{dcp::Extents{1}, std::vector<std::complex<float>>{{1, -2}}});
}

TEST_CASE("loading fills the matrices in place") {
  dcp::Memory medium;
  RowMatrix matrix = counted(4, 3);
  Eigen::VectorXf vector = Eigen::VectorXf::LinSpaced(5, 1, 5);
  dcp::StateDict state{{"matrix", matrix}, {"vector", vector}};
  save(medium, state);
  auto const before = matrix;
  float const* const address = matrix.data();
  matrix.setConstant(-1), vector.setConstant(-1);
  load(medium, state);
  CHECK((matrix == before));
  CHECK(matrix.data() == address);
  CHECK((vector == Eigen::VectorXf::LinSpaced(5, 1, 5)));
}

TEST_CASE("a matrix of another size is a shape mismatch: nothing is resized or changed") {
  dcp::Memory medium;
  RowMatrix matrix = counted(4, 3);
  save(medium, {{"matrix", matrix}});
  RowMatrix other = RowMatrix::Constant(3, 4, 7);
  dcp::ErrorCode code{};
  try {
    load(medium, {{"matrix", other}});
  } catch (dcp::Error const& error) {
    code = error.code();
  }
  CHECK(code == dcp::ErrorCode::shape_mismatch);
  CHECK((other == RowMatrix::Constant(3, 4, 7)));
}

TEST_CASE("transposed: a matrix that stores columns first is stored as its transpose and loads back") {
  dcp::Memory medium;
  Eigen::MatrixXf matrix = counted(2, 3);
  save(medium, {{"matrix", dcp::transposed(matrix)}});
  CHECK(stored<float>(medium, "matrix") == std::pair{dcp::Extents{3, 2}, std::vector<float>{0, 100, 1, 101, 2, 102}});

  Eigen::MatrixXf back = Eigen::MatrixXf::Zero(2, 3);
  load(medium, {{"matrix", dcp::transposed(back)}});
  CHECK((back == matrix));
  // Eigen's own transpose is a view of rows first, and means the same.
  back.setZero();
  load(medium, {{"matrix", back.transpose()}});
  CHECK((back == matrix));
  // Rows first: the transpose has strides.
  RowMatrix rows = RowMatrix::Zero(2, 3);
  load(medium, {{"matrix", dcp::transposed(rows)}});
  CHECK((rows == matrix));
  // Into the transposed type without either: the same bytes.
  RowMatrix plain = RowMatrix::Zero(3, 2);
  load(medium, {{"matrix", plain}});
  CHECK((plain == matrix.transpose()));
}

TEST_CASE("transposed: of a vector it has two dimensions") {
  Eigen::VectorXf column = Eigen::VectorXf::Ones(4);
  Eigen::RowVectorXf row = Eigen::RowVectorXf::Ones(4);
  CHECK(dcp::transposed(column).shape() == dcp::Extents{1, 4});
  CHECK(dcp::transposed(row).shape() == dcp::Extents{4, 1});
  CHECK(dcp::transposed(column).memory().data == reinterpret_cast<std::byte*>(column.data()));
}

TEST_CASE("view: strides are those of a Map, a Ref, a Block") {
  std::vector<float> memory(64);
  Eigen::Map<RowMatrix, 0, Eigen::Stride<Dynamic, Dynamic>> map(memory.data(), 2, 3, Eigen::Stride<Dynamic, Dynamic>(16, 2));
  auto const mapped = dcp::view(map);
  CHECK(mapped.shape() == dcp::Extents{2, 3});
  CHECK(mapped.strides() == dcp::Extents{16, 2});
  CHECK(mapped.data() == memory.data());
  CHECK(dcp::transposed(map).shape() == dcp::Extents{3, 2});
  CHECK(dcp::transposed(map).strides() == dcp::Extents{2, 16});

  RowMatrix matrix = counted(5, 7);
  auto const block = dcp::view(matrix.block(1, 2, 3, 4));
  CHECK(block.shape() == dcp::Extents{3, 4});
  CHECK(block.strides() == dcp::Extents{7, 1});
  CHECK(block.data() == matrix.data() + 9);

  Eigen::Ref<RowMatrix> reference = matrix.topLeftCorner(2, 3);
  CHECK(dcp::view(reference).strides() == dcp::Extents{7, 1});
  CHECK(dcp::view(std::as_const(reference)).data() == matrix.data());   // a reference that stays where it is

  Eigen::MatrixXf columns_first = matrix;
  auto const row = dcp::view(columns_first.row(2));
  CHECK(row.shape() == dcp::Extents{7});
  CHECK(row.strides() == dcp::Extents{5});
  CHECK(dcp::view(columns_first.diagonal()).strides() == dcp::Extents{6});
  CHECK(dcp::view(columns_first.col(1)).data() == columns_first.data() + 5);
}

TEST_CASE("maps, blocks, rows and diagonals load into the elements they refer to, and no others") {
  dcp::Memory medium;
  RowMatrix source = counted(3, 4);
  Eigen::VectorXf line = Eigen::VectorXf::LinSpaced(3, 1, 3);
  save(medium, {{"part", source}, {"line", line}});

  RowMatrix target = RowMatrix::Constant(6, 9, -1);
  load(medium, {{"part", target.block(2, 3, 3, 4)}, {"line", target.col(0).head(3)}});
  RowMatrix expected = RowMatrix::Constant(6, 9, -1);
  expected.block(2, 3, 3, 4) = source;
  expected.col(0).head(3) = line;
  CHECK((target == expected));

  std::vector<float> memory(3 * 20, -1.0f);
  Eigen::Map<RowMatrix, 0, Eigen::Stride<Dynamic, Dynamic>> strided(memory.data(), 3, 4, Eigen::Stride<Dynamic, Dynamic>(20, 3));
  Eigen::MatrixXf square = Eigen::MatrixXf::Zero(3, 3);
  load(medium, {{"part", strided}, {"line", square.diagonal()}});
  CHECK((strided == source));
  CHECK(std::count(memory.begin(), memory.end(), -1.0f) == 48);
  CHECK((square == Eigen::MatrixXf{line.asDiagonal()}));
}

TEST_CASE("law: what any block of any matrix saves, any block of the same shape loads") {
  auto const seed = std::random_device{}();
  INFO("seed " << seed);
  std::mt19937 random{seed};
  auto const below = [&](Eigen::Index n) { return static_cast<Eigen::Index>(random() % static_cast<unsigned long>(n + 1)); };
  for (int round = 0; round < 60; ++round) {
    Eigen::Index const rows = below(6), cols = below(6);
    // One more each way: Eigen's block of a matrix without elements would offset a null pointer.
    auto const around = [&](auto& m, Eigen::Index i, Eigen::Index j) { m.resize(rows + 1 + i, cols + 1 + j); };
    RowMatrix a, b;
    Eigen::MatrixXf c, d;
    around(a, below(3), below(3)), around(b, below(3), below(3)), around(c, below(3), below(3)), around(d, below(3), below(3));
    auto const part = [&](auto& m) { return m.block(below(m.rows() - rows), below(m.cols() - cols), rows, cols); };
    for (Eigen::Index i = 0; i < a.size(); ++i) a.data()[i] = static_cast<float>(random() % 1000);
    c.setConstant(-2), b.setConstant(-1), d.setConstant(-1);
    auto from = part(a);
    auto turned = part(c);
    turned = from;
    dcp::Memory medium;
    save(medium, {{"a", from}, {"c", dcp::transposed(turned)}});

    auto into = part(b);
    auto turned_into = part(d);
    load(medium, {{"a", into}, {"c", dcp::transposed(turned_into)}});
    CHECK((into == from));
    CHECK((turned_into == from));
    CHECK((b.array() == -1).count() == b.size() - rows * cols);   // random() % 1000 is never -1
    CHECK((d.array() == -1).count() == d.size() - rows * cols);
  }
}

TEST_CASE("empty matrices are tensors without elements") {
  dcp::Memory medium;
  RowMatrix no_rows(0, 5), no_columns(5, 0), nothing;
  Eigen::MatrixXf no_columns_first(0, 3);
  Eigen::VectorXf no_elements;
  dcp::StateDict state{{"no_rows", no_rows}, {"no_columns", no_columns}, {"nothing", nothing}, {"first", dcp::transposed(no_columns_first)}, {"vector", no_elements}};
  save(medium, state);
  load(medium, state);
  CHECK(stored<float>(medium, "no_rows").first == dcp::Extents{0, 5});
  CHECK(stored<float>(medium, "no_columns").first == dcp::Extents{5, 0});
  CHECK(stored<float>(medium, "nothing").first == dcp::Extents{0, 0});
  CHECK(stored<float>(medium, "first").first == dcp::Extents{3, 0});
  CHECK(stored<float>(medium, "vector").first == dcp::Extents{0});
}

TEST_CASE("half and bfloat16 of Eigen are F16 and BF16, bit for bit") {
  dcp::Memory medium;
  Eigen::Matrix<Eigen::half, 3, 1> half{Eigen::half{0.5f}, Eigen::half{-2.0f}, Eigen::half{65504.0f}};
  save(medium, {{"half", half}});
  dcp::SelfComm self;
  CHECK(dcp::load_from_keys<InMemory>(self, {medium, "ckpt"}, {"half"}).tensors().at("half").dtype() == dcp::DType::f16);
  CHECK(stored<std::uint16_t>(medium, "half").second == std::vector<std::uint16_t>{0x3800, 0xC000, 0x7BFF});
#if EIGEN_VERSION_AT_LEAST(3, 4, 0)
  Eigen::Matrix<Eigen::bfloat16, 2, 1> brain{Eigen::bfloat16{1.0f}, Eigen::bfloat16{-3.0f}};
  save(medium, {{"brain", brain}});
  CHECK(dcp::load_from_keys<InMemory>(self, {medium, "ckpt"}, {"brain"}).tensors().at("brain").dtype() == dcp::DType::bf16);
  CHECK(stored<std::uint16_t>(medium, "brain").second == std::vector<std::uint16_t>{0x3F80, 0xC040});
#endif
}

TEST_CASE("a view of a matrix is the local memory of a ShardedTensor, whichever way it is stored") {
  dcp::Memory medium;
  RowMatrix const whole = counted(7, 5);
  using Rows = dcp::Placement<dcp::Shard<0>>;
  using Columns = dcp::Placement<dcp::Shard<1>>;
  auto const local = [](dcp::Box const& box) { return Box2{box.shape[0], box.shape[1]}; };

  dcp::run_threads(3, [&](dcp::ThreadComm& world) {
    dcp::DeviceMesh<1> mesh{world, {3}};
    auto const box = dcp::local_box<Rows>(mesh, {7, 5});
    RowMatrix padded = RowMatrix::Constant(local(box).rows + 1, 8, -1);   // the shard is part of a larger buffer
    auto shard = padded.topLeftCorner(local(box).rows, 5);
    shard = whole.middleRows(box.origin[0] - (box.shape[0] == 0 ? local(box).rows : 0), local(box).rows);
    dcp::ShardedTensor<float, Rows> tensor{mesh, {7, 5}, dcp::view(shard)};
    dcp::save<InMemory>(world, {medium, "ckpt"}, {{"weight", tensor}});
  });
  CHECK(stored<float>(medium, "weight") == std::pair{dcp::Extents{7, 5}, std::vector<float>(whole.data(), whole.data() + whole.size())});

  std::mutex one_at_a_time;
  RowMatrix gathered = RowMatrix::Constant(7, 5, -1);
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    dcp::DeviceMesh<1> mesh{world, {2}};
    auto const box = dcp::local_box<Columns>(mesh, {7, 5});
    Eigen::MatrixXf shard = Eigen::MatrixXf::Zero(local(box).cols, local(box).rows);   // columns first: the transpose of the local part
    dcp::ShardedTensor<float, Columns, dcp::Shape<7, 5>> tensor{mesh, dcp::transposed(shard)};
    dcp::load<InMemory>(world, {medium, "ckpt"}, {{"weight", tensor}});
    std::lock_guard lock{one_at_a_time};
    gathered.middleCols(box.origin[1], local(box).cols) = shard.transpose();
  });
  CHECK((gathered == whole));
}

TEST_CASE("a matrix that is too small for the local part is refused") {
  dcp::SelfComm self;
  dcp::DeviceMesh<1> mesh{self, {1}};
  RowMatrix small(6, 5);
  using P = dcp::Placement<dcp::Replicate>;
  CHECK_THROWS_AS((dcp::ShardedTensor<float, P>{mesh, {7, 5}, dcp::view(small)}), dcp::Error);
}
