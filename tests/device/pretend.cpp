// An accelerator that is none. Its tensors lie in ordinary memory and each of its kernels is the CPU's, called on the same
// memory with the same strides, so that what a model computes on it equals the CPU bit for bit. What it does like CUDA is to
// refuse: an operator that meets tensors of two devices, and a random generator of another device.
//
// It takes the place of torch's HPU, which no build of torch brings itself. A device of the PrivateUse1 kind would do for the
// kernels, but `Module.to` replaces the parameters of a module on its way there, where on the way to CUDA it keeps them.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/detail/HPUHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using c10::IValue;

constexpr auto kPretend = c10::DeviceType::HPU;
const c10::Device device_0(kPretend, 0);
const c10::Device cpu(c10::DeviceType::CPU);

// What was refused since the last question: an `except` in the code under test must not hide it.
std::vector<std::string>& refusals() {
  static std::vector<std::string> all;
  return all;
}

[[noreturn]] void refuse(const std::string& words) {
  refusals().push_back(words);
  TORCH_CHECK(false, words);
}

// --- memory: the storage of a device tensor owns a storage of the CPU, which owns the bytes

c10::DataPtr wrap(const c10::Storage& host) {
  auto* owned = new c10::Storage(host);
  auto free = [](void* context) { delete static_cast<c10::Storage*>(context); };
  return {host.unsafeGetStorageImpl()->mutable_data(), owned, free, device_0};
}

struct PretendAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    auto* memory = c10::GetCPUAllocator();
    return wrap(c10::Storage(c10::Storage::use_byte_size_t(), num_bytes, memory->allocate(num_bytes), memory, true));
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t num_bytes) const override { default_copy_data(to, from, num_bytes); }
};
PretendAllocator allocator;
REGISTER_ALLOCATOR(kPretend, &allocator);

c10::Storage host_storage(const c10::Storage& storage) {
  return *static_cast<c10::Storage*>(storage.unsafeGetStorageImpl()->mutable_data_ptr().get_context());
}

c10::Storage device_storage(const c10::Storage& host) {
  return c10::Storage(c10::Storage::use_byte_size_t(), host.nbytes(), wrap(host), &allocator, true);
}

// A tensor over `storage` with everything else as in `like`.
Tensor over(c10::Storage storage, const Tensor& like, c10::DispatchKey key) {
  auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) out.unsafeGetTensorImpl()->set_wrapped_number(true);
  out._set_conj(like.is_conj());
  out._set_neg(like.is_neg());
  return out;
}

bool on_device(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == kPretend; }

Tensor host(const Tensor& tensor) {
  return on_device(tensor) ? over(host_storage(tensor.storage()), tensor, c10::DispatchKey::CPU) : tensor;
}

// --- random numbers: from a generator of its own, which draws what the CPU's draws from the same seed

struct PretendGenerator final : c10::GeneratorImpl {
  explicit PretendGenerator(at::Generator inner)
      : c10::GeneratorImpl(device_0, c10::DispatchKeySet(c10::DispatchKey::HPU)), inner(std::move(inner)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { inner.set_offset(offset); }
  uint64_t get_offset() const override { return inner.get_offset(); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  GeneratorImpl* clone_impl() const override { return new PretendGenerator(inner.clone()); }
  at::Generator inner;
};

at::Generator inner(const at::Generator& generator) {
  return static_cast<PretendGenerator*>(generator.unsafeGetGeneratorImpl())->inner;
}

at::Generator& default_generator() {
  static auto generator = at::make_generator<PretendGenerator>(at::detail::createCPUGenerator());
  return generator;
}

// --- the device itself: one, with one stream that is always done

struct PretendGuard final : c10::impl::DeviceGuardImplInterface {
  PretendGuard() = default;
  explicit PretendGuard(c10::DeviceType) {}
  c10::DeviceType type() const override { return kPretend; }
  c10::Device exchangeDevice(c10::Device) const override { return device_0; }
  c10::Device getDevice() const override { return device_0; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(HPU, PretendGuard);

struct PretendHooks final : at::HPUHooksInterface {
  explicit PretendHooks(at::HPUHooksArgs) {}
  void init() const override {}
  bool hasHPU() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::Device getDeviceFromPtr(void*) const override { return device_0; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<PretendGenerator>(at::detail::createCPUGenerator());
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return default_generator();
  }
};

} // namespace

namespace at {
C10_REGISTER_CLASS(HPUHooksRegistry, HPUHooks, PretendHooks);
} // namespace at

namespace {

// --- operators

std::string full_name(const c10::FunctionSchema& schema) {
  return schema.overload_name().empty() ? schema.name() : schema.name() + "." + schema.overload_name();
}

// Where CUDA takes a number from a tensor of the CPU without dimensions. Elsewhere it refuses even that.
bool takes_host_numbers(const c10::OperatorHandle& op) {
  static const std::set<std::string> more = {
      "aten::masked_fill", "aten::masked_fill_", "aten::index_fill", "aten::index_fill_", "aten::index_put",
      "aten::index_put_", "aten::_index_put_impl_", "aten::where", "aten::fill_", "aten::fill"};
  return op.hasTag(at::Tag::pointwise) || more.count(op.schema().name()) || op.schema().name().rfind("aten::_foreach_", 0) == 0;
}

// The positions that index a tensor of the device may lie on the CPU.
bool takes_host_positions(const c10::OperatorHandle& op) {
  static const std::set<std::string> all = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};
  return all.count(op.schema().name()) > 0;
}

// Every tensor in `value`, whatever kind of list holds it, and its replacement written back.
template <class Visit>
IValue visit_tensors(const IValue& value, const Visit& visit) {
  if (value.isTensor()) return visit(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> out;
    for (const Tensor& tensor : value.toTensorVector()) out.push_back(visit(tensor));
    return out;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> out;
    for (const auto& each : value.toOptionalTensorList()) {
      std::optional<Tensor> tensor = each;
      out.push_back(tensor ? std::optional<Tensor>(visit(*tensor)) : std::nullopt);
    }
    return out;
  }
  return value;
}

void on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto name = full_name(schema);
  const auto first = stack->size() - schema.arguments().size();
  bool any_device = false, any_cpu = false;
  std::vector<std::pair<Tensor, Tensor>> pairs;            // each tensor of the device, and what stands for it on the host
  std::map<c10::StorageImpl*, c10::Storage> device_of_host; // of each storage of the host, the one of the device that owns it

  std::vector<size_t> drawing;  // arguments that name no generator
  for (size_t i = first; i < stack->size(); ++i) {
    IValue& argument = (*stack)[i];
    if (argument.isNone() && schema.arguments()[i - first].type()->str() == "Generator?") drawing.push_back(i);
    const bool positions = argument.isOptionalTensorList() && takes_host_positions(op);
    if (argument.isDevice()) {
      any_device |= argument.toDevice().type() == kPretend;
      argument = cpu;
    } else if (argument.isGenerator()) {
      auto generator = argument.toGenerator();
      if (generator.defined() && generator.device().type() != kPretend)
        refuse("Expected a 'hpu' device type for generator but found '" + generator.device().str() + "' (" + name + ")");
      if (generator.defined()) argument = inner(generator);
    } else if (argument.isStorage()) {
      auto storage = argument.toStorage();
      if (storage.device_type() == kPretend) {
        any_device = true;
        device_of_host.emplace(host_storage(storage).unsafeGetStorageImpl(), storage);
        argument = host_storage(storage);
      } else {
        any_cpu = true;
      }
    } else {
      argument = visit_tensors(argument, [&](const Tensor& tensor) {
        if (!on_device(tensor)) {
          any_cpu |= tensor.defined() && tensor.device().is_cpu() && !positions && !(tensor.dim() == 0 && takes_host_numbers(op));
          return tensor;
        }
        any_device = true;
        pairs.emplace_back(tensor, host(tensor));
        device_of_host.emplace(pairs.back().second.storage().unsafeGetStorageImpl(), tensor.storage());
        return pairs.back().second;
      });
    }
  }
  if (any_device && any_cpu)
    refuse("Expected all tensors to be on the same device, but found at least two devices, hpu:0 and cpu! (" + name + ")");

  if (any_device)
    for (size_t i : drawing) (*stack)[i] = inner(default_generator());
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    op.callBoxed(stack);
  }

  const auto to_device = [&](const c10::Storage& of_host) {
    auto found = device_of_host.find(of_host.unsafeGetStorageImpl());
    if (found == device_of_host.end())
      found = device_of_host.emplace(of_host.unsafeGetStorageImpl(), device_storage(of_host)).first;
    return found->second;
  };
  // An operator may have resized a tensor in place, given it other strides or another storage.
  for (auto& [tensor, stand_in] : pairs) {
    auto storage = to_device(stand_in.storage());
    auto* impl = storage.unsafeGetStorageImpl();
    if (impl->data() != stand_in.storage().data() || impl->nbytes() != stand_in.storage().nbytes()) {
      impl->set_data_ptr_noswap(wrap(stand_in.storage()));
      impl->set_nbytes(stand_in.storage().nbytes());
    }
    auto* changed = tensor.unsafeGetTensorImpl();
    if (!tensor.storage().is_alias_of(storage)) changed->set_storage_keep_dtype(storage);
    if (tensor.sizes() != stand_in.sizes() || tensor.strides() != stand_in.strides() ||
        tensor.storage_offset() != stand_in.storage_offset())
      changed->set_sizes_and_strides(stand_in.sizes(), stand_in.strides(), stand_in.storage_offset());
  }
  const auto result = [&](const Tensor& tensor) -> Tensor {
    if (!tensor.defined() || on_device(tensor) || !any_device) return tensor;
    for (auto& [of_device, stand_in] : pairs)
      if (stand_in.is_same(tensor)) return of_device;
    if (tensor.layout() != c10::kStrided) refuse("the pretend accelerator has no tensor that is not strided (" + name + ")");
    return over(to_device(tensor.storage()), tensor, c10::DispatchKey::HPU);
  };
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i)
    (*stack)[i] = visit_tensors((*stack)[i], result);
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  host(to).copy_(host(from));
  return to;
}

// Fused attention is chosen by what the hardware has: here the formula, as on a device that has no kernel for it.
int64_t fused_choice(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                     std::optional<double>, bool) {
  return 0;
}

std::vector<std::string> take_refusals() { return std::exchange(refusals(), {}); }

} // namespace

Tensor rng_state() { return default_generator().get_state(); }
void set_rng_state(const Tensor& state) { default_generator().set_state(state); }
void seed(int64_t seed) { default_generator().set_current_seed(seed); }

TORCH_LIBRARY(pretend, m) {
  m.def("take_refusals() -> str[]", &take_refusals);
  m.def("rng_state() -> Tensor", &rng_state);
  m.def("set_rng_state(Tensor state) -> ()", &set_rng_state);
  m.def("seed(int seed) -> ()", &seed);
}

TORCH_LIBRARY_IMPL(_, HPU, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>()); }

// Whatever has a kernel for the CPU has this one, also where torch could compose it of others, as it then would round elsewise.
TORCH_LIBRARY_IMPL(aten, HPU, m) {
  m.impl("_copy_from", copy_from);
  m.impl("_fused_sdp_choice", fused_choice);
  for (const auto& each : c10::Dispatcher::singleton().getAllOpNames()) {
    if (each.name.rfind("aten::", 0) != 0 || each.name == "aten::_fused_sdp_choice" || each.name == "aten::_copy_from") continue;
    auto op = c10::Dispatcher::singleton().findOp(each);
    if (!op || !op->hasKernelForDispatchKey(c10::DispatchKey::CPU)) continue;
    const auto key = each.overload_name.empty() ? each.name : each.name + "." + each.overload_name;
    m.impl(key.c_str(), torch::CppFunction::makeFromBoxedFunction<&on_host>());
  }
  for (const char* composed : {"convolution", "convolution_backward"})
    m.impl(composed, torch::CppFunction::makeFromBoxedFunction<&on_host>());
}

// The one operator of ours that is made of sparse tensors, which this device has none of.
TORCH_LIBRARY_IMPL(tithe, HPU, m) {
  m.impl("sampled_product", torch::CppFunction::makeFromBoxedFunction<&on_host>());
}
