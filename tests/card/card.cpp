// A second device that is no device: tensors of "card" lie in the host's memory and are computed by the CPU's kernels,
// but they are not CPU tensors. What a GPU refuses of a program that mixes the two is refused here, by name.
//
// Every operation that a backend must have for itself (memory, views, copies, scalars) is below; all others go through
// one boxed fallback, which shows the same memory to the CPU's kernel.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace {

constexpr auto CARD = c10::DeviceType::PrivateUse1;
const c10::Device DEVICE(CARD, 0);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<CARD> {
  c10::Device getDevice() const override { return DEVICE; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct CardAllocator final : c10::Allocator {
  static void release(void* pointer) { c10::GetCPUAllocator()->raw_deallocate(pointer); }
  c10::DataPtr allocate(size_t size) override {
    void* data = size ? c10::GetCPUAllocator()->raw_allocate(size) : nullptr;
    return {data, data, &release, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};
CardAllocator allocator;
REGISTER_ALLOCATOR(CARD, &allocator)

// Draws what a CPU's would.
struct CardGenerator final : c10::GeneratorImpl {
  at::Generator host;
  explicit CardGenerator(at::Generator made)
      : c10::GeneratorImpl(DEVICE, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), host(std::move(made)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_offset(uint64_t offset) override { host.set_offset(offset); }
  uint64_t get_offset() const override { return host.get_offset(); }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  CardGenerator* clone_impl() const override { return new CardGenerator(host.clone()); }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<CardGenerator>(at::detail::createCPUGenerator());
  }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto data = allocator.allocate(size);
    if (size && storage.nbytes()) std::memcpy(data.get(), storage.data(), std::min(size, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(size);
  }
};

// ---------------------------------------------------------------------------------------------------- shared memory

void let_go(void* storage) { delete static_cast<c10::Storage*>(storage); }

// The same memory as another device's storage, which keeps the first one alive.
c10::Storage shown(const c10::Storage& storage, c10::Device device) {
  c10::Allocator* owner = device.is_cpu() ? c10::GetCPUAllocator() : &allocator;
  c10::DataPtr data(storage.mutable_data(), new c10::Storage(storage), &let_go, device);
  return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), owner, true);
}

at::Tensor over(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) made._set_conj(true);
  if (like.is_neg()) made._set_neg(true);
  return made;
}

// What one call shows of the card to the CPU, and takes back from it.
struct Shown {
  std::unordered_map<c10::StorageImpl*, c10::Storage> on_host;   // card storage -> host storage
  std::unordered_map<c10::StorageImpl*, c10::Storage> on_card;   // host storage -> card storage
  std::unordered_map<c10::TensorImpl*, at::Tensor> originals;    // host tensor -> card tensor

  at::Tensor to_host(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device().type() != CARD) return tensor;
    auto* key = tensor.storage().unsafeGetStorageImpl();
    auto found = on_host.find(key);
    if (found == on_host.end()) {
      found = on_host.emplace(key, shown(tensor.storage(), c10::kCPU)).first;
      on_card.emplace(found->second.unsafeGetStorageImpl(), tensor.storage());
    }
    auto host = over(found->second, c10::DispatchKey::CPU, tensor);
    originals.emplace(host.unsafeGetTensorImpl(), tensor);
    return host;
  }

  at::Tensor to_card(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
    auto original = originals.find(tensor.unsafeGetTensorImpl());
    if (original != originals.end()) return original->second;
    auto* key = tensor.storage().unsafeGetStorageImpl();
    auto found = on_card.find(key);
    if (found == on_card.end()) found = on_card.emplace(key, shown(tensor.storage(), DEVICE)).first;
    return over(found->second, c10::DispatchKey::PrivateUse1, tensor);
  }

  // An operation with ``out`` may have resized what it was given.
  void resize_originals() {
    for (auto& [host, card] : originals) {
      if (host->sizes().equals(card.sizes())) continue;
      auto* to = card.unsafeGetTensorImpl();
      to->set_storage_keep_dtype(shown(c10::Storage(host->storage()), DEVICE));
      to->set_sizes_and_strides(host->sizes(), host->strides(), host->storage_offset());
    }
  }
};

template <typename F>
void each_tensor(c10::IValue& value, F&& f) {
  if (value.isTensor()) {
    value = c10::IValue(f(value.toTensor()));
  } else if (value.isTensorList()) {
    auto list = value.toTensorVector();
    for (auto& tensor : list) tensor = f(tensor);
    value = c10::IValue(c10::List<at::Tensor>(list));
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (std::optional<at::Tensor> tensor : value.toOptionalTensorList())
      list.push_back(tensor ? std::optional<at::Tensor>(f(*tensor)) : std::nullopt);
    value = c10::IValue(std::move(list));
  } else if (value.isList()) {
    auto list = value.toList();
    c10::List<c10::IValue> made = c10::impl::GenericList(list.elementType());
    for (size_t i = 0; i < list.size(); i++) {
      c10::IValue item = list.get(i);
      each_tensor(item, f);
      made.push_back(item);
    }
    value = c10::IValue(std::move(made));
  } else if (value.isTuple()) {
    auto items = value.toTuple()->elements().vec();
    for (auto& item : items) each_tensor(item, f);
    value = c10::IValue(c10::ivalue::Tuple::create(std::move(items)));
  }
}

// ------------------------------------------------------------------------------------------------------- the fallback

// A GPU's kernels take CPU tensors of no dimensions as numbers, and nothing else of the CPU's.
void refuse_mixtures(const c10::FunctionSchema& schema, const torch::jit::Stack& stack, size_t first) {
  for (size_t i = 0; i < schema.arguments().size(); i++) {
    auto value = stack[first + i];
    const auto* alias = schema.arguments()[i].alias_info();
    bool written = alias && alias->isWrite();
    each_tensor(value, [&](const at::Tensor& tensor) {
      bool number = tensor.defined() && tensor.dim() == 0 && !written;
      TORCH_CHECK(
          !tensor.defined() || !tensor.device().is_cpu() || number, schema.name(), ": ", schema.arguments()[i].name(),
          " ", tensor.sizes(), " is on the CPU, and others are on the card");
      return tensor;
    });
  }
}

// What CUDA has no deterministic form of; a product has one that cuBLAS must be told to take before the first of all.
void refuse_what_is_by_chance(const c10::FunctionSchema& schema, const torch::jit::Stack& stack, size_t first) {
  static const std::unordered_set<std::string> products = {
      "aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv", "aten::dot"};
  static const std::unordered_set<std::string> never = {"aten::kthvalue", "aten::put_", "aten::histc"};
  static const std::unordered_set<std::string> of_fractions = {"aten::cumsum", "aten::cumprod"};
  const auto& name = schema.name();
  bool product = products.count(name);
  static bool told = false, decided = false;
  if (product && !decided) {
    const char* set = std::getenv("CUBLAS_WORKSPACE_CONFIG");
    told = set && (std::string(set) == ":4096:8" || std::string(set) == ":16:8");
    decided = true;
  }
  if (!at::globalContext().deterministicAlgorithms()) return;
  TORCH_CHECK(!product || told, name, " of cuBLAS is by chance: CUBLAS_WORKSPACE_CONFIG was not set in time");
  TORCH_CHECK(!never.count(name), name, " has no deterministic form on CUDA");
  TORCH_CHECK(
      !of_fractions.count(name) || !at::isFloatingType(stack[first].toTensor().scalar_type()), name,
      " of fractions has no deterministic form on CUDA");
}

void computed_by_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  size_t first = stack->size() - schema.arguments().size();
  bool of_the_card = false;
  for (size_t i = first; i < stack->size(); i++)
    each_tensor((*stack)[i], [&](const at::Tensor& tensor) {
      of_the_card |= tensor.defined() && tensor.device().type() == CARD;
      return tensor;
    });
  if (of_the_card) {
    refuse_mixtures(schema, *stack, first);
    refuse_what_is_by_chance(schema, *stack, first);
  }
  Shown call;
  bool makes_one = !of_the_card;
  for (size_t i = first; i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isDevice() && value.toDevice().type() == CARD) {
      value = c10::IValue(c10::Device(c10::kCPU));
      makes_one = true;
    }
    if (value.isGenerator() && value.toGenerator().device().type() == CARD)
      value = c10::IValue(static_cast<CardGenerator*>(value.toGenerator().unsafeGetGeneratorImpl())->host);
    each_tensor(value, [&](const at::Tensor& tensor) { return call.to_host(tensor); });
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.resize_originals();
  if (of_the_card || makes_one)
    for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++)
      each_tensor((*stack)[i], [&](const at::Tensor& tensor) { return call.to_card(tensor); });
}

// ------------------------------------------------------------------------------ what a backend has for itself

at::Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

at::Tensor& copy_from(const at::Tensor& from, at::Tensor& to) {
  Shown call;
  auto target = call.to_host(to);
  target.copy_(call.to_host(from));
  return to;
}

at::Tensor _copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  auto target = to;
  return copy_from(from, target);
}

at::Tensor _copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  auto target = to;
  at::native::resize_(target, from.sizes());
  return copy_from(from, target);
}

at::Scalar scalar(const at::Tensor& tensor) {
  Shown call;
  return at::_local_scalar_dense(call.to_host(tensor));
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

at::Tensor& set_storage(
    at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto* to = self.unsafeGetTensorImpl();
  to->set_storage_keep_dtype(std::move(source));
  to->set_sizes_and_strides(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}

bool is_pinned(const at::Tensor&, std::optional<at::Device>) { return false; }

int64_t attention(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
    std::optional<double>, bool) {
  return 0;  // by its definition
}

at::Tensor view(const at::Tensor& self, at::IntArrayRef size) { return at::native::view(self, size); }

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &attention)
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&computed_by_the_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("_copy_from", TORCH_FN(_copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(_copy_from_and_resize));
  m.impl("_local_scalar_dense", TORCH_FN(scalar));
  m.impl("resize_", TORCH_FN(resize));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("set_.source_Tensor", TORCH_FN(at::native::set_tensor_));
  m.impl("set_.source_Storage", TORCH_FN(at::native::set_));
}

// torch has kernels of its own here, which look for a backend of the card: gloo takes the CPU's.
TORCH_LIBRARY_IMPL(c10d, PrivateUse1, m) {
  for (const char* name : {"_allgather_base_", "_reduce_scatter_base_", "allgather_", "allgather_coalesced_", "allgather_into_tensor_coalesced_", "allreduce_", "allreduce_coalesced_", "alltoall_", "alltoall_base_", "barrier", "broadcast_", "gather_", "recv_", "recv_any_source_", "reduce_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_", "scatter_", "send"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&computed_by_the_cpu>());
}

namespace {
// Once, before the first tensor.
struct Begin {
  Begin() {
    static Hooks hooks;
    at::RegisterPrivateUse1HooksInterface(&hooks);
    c10::register_privateuse1_backend("card");
  }
} begin;
}  // namespace
