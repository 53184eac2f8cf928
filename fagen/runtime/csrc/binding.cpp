// The PyTorch ops of fagen, and the short way from Python to a kernel.
//
// forward, forward_lse and forward_out find their kernel by table.h, fill its params and launch, or let
// PyTorch compute (op `fallback`). No CUDA header: streams and devices go through c10.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "table.h"  // pasted in by binding.py

namespace fagen {

using Overlap = void(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&,
                     const Tensor&);
using ForwardOut = Tensor(FAGEN_PARAMS, bool, Tensor&);

// ---- what a kernel cannot be asked --------------------------------------------------------------------------------

constexpr int64_t kLongest = 1 << 29;  // rows or keys: what a kernel takes for "without bound" lies there
constexpr double kLeast = std::numeric_limits<float>::min();  // as in ops/attention/arguments.py
constexpr double kLargest = 2.3e38;

// Whether a kernel's float32 holds them, and their quotient.
bool held(double softcap, double scale) {
  if (softcap == 0) return std::abs(scale) <= kLargest;
  return softcap >= std::max(kLeast, std::abs(scale) / kLargest) && std::max(softcap, std::abs(scale)) <= kLargest;
}

// Sizes and numbers that 32 bits do not hold. Python refuses them before; a traced or a direct call is seen only here.
void refuse_beyond_32_bits(const Call& c) {
  static const auto refuse = handle<void(c10::string_view, c10::string_view)>("fagen::refuse");
  int64_t bits = 0;  // of all sizes
  for (const Tensor* t : {&c.q, &c.k, &c.v})
    for (const int64_t size : t->sizes()) bits |= size;
  if (bits > INT32_MAX) refuse.call("a size is beyond 2^31 - 1", "");
  if (!held(c.softcap, c.scale.value_or(1)))
    refuse.call("softcap and scale must be finite and of float32's range, softcap not negative", "");
}

bool shares_no_memory(const Tensor& a, const Tensor& b) {
  const auto span = [](const Tensor& t) {
    int64_t last = t.numel() ? 1 : 0;
    for (int64_t i = 0; t.numel() && i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
    const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    return std::pair(begin, begin + last * t.element_size());
  };
  const auto [a_begin, a_end] = span(a);
  const auto [b_begin, b_end] = span(b);
  return a_end <= b_begin || b_end <= a_begin;
}

// What lies in one buffer, one beside the other, Python looks at more closely.
void refuse_overlap(const Call& c, const Tensor& out) {
  static const auto look = handle<Overlap>("fagen::refuse_overlap");
  const bool apart = out.is_non_overlapping_and_dense() && shares_no_memory(out, c.q) && shares_no_memory(out, c.k) &&
                     shares_no_memory(out, c.v) && (!c.intervals || shares_no_memory(out, *c.intervals)) &&
                     (!c.alibi_slopes || shares_no_memory(out, *c.alibi_slopes));
  if (!apart) look.call(c.q, c.k, c.v, c.intervals, c.alibi_slopes, out);
}

// The kernel's functions, or none where PyTorch shall compute.
Entry entry_for(const Call& c, const Tensor* out, bool want_lse) {
  refuse_beyond_32_bits(c);
  if (c.scale && !(*c.scale >= kLeast)) return {};  // the kernels take the maximum before they scale
  if (c.q.dim() == 4 && c.k.dim() == 4 && std::max(c.q.size(c.row()), c.k.size(c.row())) > kLongest) return {};
  return find(c, out, want_lse);
}

// ---- launching ------------------------------------------------------------------------------------------------------

void put_strides(int64_t (&stride)[3], const Tensor& t, const Call& c) {
  stride[0] = t.stride(0);
  stride[1] = t.stride(c.row());
  stride[2] = t.stride(c.head());
}

fagen_params params_of(const Call& c, const Tensor& out, const Tensor* lse) {
  fagen_params p{};
  p.q = c.q.const_data_ptr();
  p.k = c.k.const_data_ptr();
  p.v = c.v.const_data_ptr();
  p.o = out.data_ptr();
  put_strides(p.q_stride, c.q, c);
  put_strides(p.k_stride, c.k, c);
  put_strides(p.v_stride, c.v, c);
  put_strides(p.o_stride, out, c);
  if (lse) p.lse = lse->data_ptr<float>();
  if (c.intervals) {
    const Tensor& t = *c.intervals;
    p.intervals = t.const_data_ptr<int32_t>();
    p.mask_heads = static_cast<int32_t>(t.size(1));
    p.intervals_stride[0] = t.size(0) > 1 ? t.stride(0) : 0;
    p.intervals_stride[1] = t.stride(1);
    p.intervals_stride[2] = t.stride(2);
  }
  if (c.alibi_slopes) {
    p.alibi_slopes = c.alibi_slopes->const_data_ptr<float>();
    p.alibi_stride = c.alibi_slopes->dim() == 2 && c.alibi_slopes->size(0) > 1 ? c.alibi_slopes->stride(0) : 0;
  }
  p.batch = static_cast<int32_t>(c.q.size(0));
  p.seqlen_q = static_cast<int32_t>(c.q.size(c.row()));
  p.heads = static_cast<int32_t>(c.q.size(c.head()));
  p.seqlen_k = static_cast<int32_t>(c.k.size(c.row()));
  p.kv_heads = static_cast<int32_t>(c.k.size(c.head()));
  p.head_dim = static_cast<int32_t>(c.q.size(3));
  p.head_dim_v = static_cast<int32_t>(c.v.size(3));
  // a wider band shows no more, and its sum with a row would leave 32 bits
  p.window_left = static_cast<int32_t>(std::min<int64_t>(c.window_left, p.seqlen_k));
  p.window_right = static_cast<int32_t>(std::min<int64_t>(c.right(), p.seqlen_q));
  p.scale = static_cast<float>(c.scale ? *c.scale : 1.0 / std::sqrt(static_cast<double>(c.q.size(3))));
  p.softcap = static_cast<float>(c.softcap);
  return p;
}

void* current_stream(const at::Device& device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

void launch(const Entry& entry, const Call& c, const Tensor& out, const Tensor* lse) {
  fagen_params p = params_of(c, out, lse);
  const bool gpu = c.q.is_cuda();
  const c10::OptionalDeviceGuard guard(gpu ? std::optional<at::Device>(c.q.device()) : std::nullopt);
  Tensor workspace;
  if (const uint64_t need = entry.workspace_bytes(&p)) {
    workspace = at::empty({static_cast<int64_t>(need) + kWorkspaceAlignment}, c.q.options().dtype(at::kByte));
    const auto start = reinterpret_cast<uintptr_t>(workspace.data_ptr());
    p.workspace =
        reinterpret_cast<void*>((start + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment);
  }
  const int status = entry.launch(&p, gpu ? current_stream(c.q.device()) : nullptr);
  if (status != 0) {
    static const auto fail = handle<void(c10::string_view, c10::string_view)>("fagen::fail");
    fail.call("a kernel could not run", entry.error(status));
  }
}

Tensor new_out(const Call& c) {
  std::array<int64_t, 4> sizes = {c.q.size(0), c.q.size(1), c.q.size(2), c.v.size(3)};
  return at::empty(sizes, c.q.options());
}

Tensor new_lse(const Call& c) {
  return at::empty({c.q.size(0), c.q.size(c.head()), c.q.size(c.row())}, c.q.options().dtype(at::kFloat));
}

std::tuple<Tensor, Tensor> by_torch(const Call& c, bool want_lse) {
  static const auto op = handle<Fallback>("fagen::fallback");
  return op.call(FAGEN_FIELDS(c), want_lse);
}

Tensor forward(FAGEN_PARAMS) {
  const Call c{FAGEN_ARGS};
  const Entry entry = entry_for(c, nullptr, false);
  if (!entry.launch) return std::get<0>(by_torch(c, false));
  Tensor out = new_out(c);
  launch(entry, c, out, nullptr);
  return out;
}

std::tuple<Tensor, Tensor> forward_lse(FAGEN_PARAMS) {
  const Call c{FAGEN_ARGS};
  const Entry entry = entry_for(c, nullptr, true);
  if (!entry.launch) return by_torch(c, true);
  Tensor out = new_out(c), lse = new_lse(c);
  launch(entry, c, out, &lse);
  return {out, lse};
}

// Fills `out`; returns the LSE, or an empty tensor if it is not wanted.
Tensor forward_out(FAGEN_PARAMS, bool want_lse, Tensor& out) {
  const Call c{FAGEN_ARGS};
  refuse_overlap(c, out);
  const Entry entry = entry_for(c, &out, want_lse);
  if (!entry.launch) {
    auto [result, lse] = by_torch(c, want_lse);
    out.copy_(result);
    return want_lse ? lse : at::empty({0}, lse.options());
  }
  Tensor lse = want_lse ? new_lse(c) : at::empty({0}, c.q.options().dtype(at::kFloat));
  launch(entry, c, out, want_lse ? &lse : nullptr);
  return lse;
}

// ---- gradients ------------------------------------------------------------------------------------------------------

// Whether a gradient is wanted of the output, or forward mode put a tangent on an input.
bool differentiated(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& alibi_slopes,
                    const Tensor* out = nullptr) {
  const bool grad = at::GradMode::is_enabled();
  const auto wanted = [grad](const Tensor& t) {
    return (grad && t.requires_grad()) || t._fw_grad(/*level=*/0).defined();
  };
  return wanted(q) || wanted(k) || wanted(v) || (alibi_slopes && wanted(*alibi_slopes)) || (out && wanted(*out));
}

Tensor forward_autograd(FAGEN_PARAMS) {
  static const auto op = handle<Forward>("fagen::forward");
  if (differentiated(q, k, v, alibi_slopes)) return std::get<0>(by_torch(Call{FAGEN_ARGS}, false));
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(FAGEN_ARGS);
}

std::tuple<Tensor, Tensor> forward_lse_autograd(FAGEN_PARAMS) {
  static const auto op = handle<ForwardLse>("fagen::forward_lse");
  if (differentiated(q, k, v, alibi_slopes)) return by_torch(Call{FAGEN_ARGS}, true);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(FAGEN_ARGS);
}

Tensor forward_out_autograd(FAGEN_PARAMS, bool want_lse, Tensor& out) {
  static const auto op = handle<ForwardOut>("fagen::forward_out");
  if (differentiated(q, k, v, alibi_slopes, &out)) {
    auto [result, lse] = by_torch(Call{FAGEN_ARGS}, want_lse);
    out.copy_(result);
    return want_lse ? lse : at::empty({0}, lse.options());
  }
  const at::AutoDispatchBelowAutograd guard;
  return op.call(FAGEN_ARGS, want_lse, out);
}

// Whoever saved `out` for a gradient must learn that it has changed.
Tensor forward_out_in_place(FAGEN_PARAMS, bool want_lse, Tensor& out) {
  static const auto op = handle<ForwardOut>("fagen::forward_out");
  out.unsafeGetTensorImpl()->bump_version();
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(FAGEN_ARGS, want_lse, out);
}

// ---- from Python ----------------------------------------------------------------------------------------------------

// A plain, dense tensor: no subclass whose __torch_function__ would want to see the call.
bool plain(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return false;
  const Tensor& t = THPVariable_Unpack(object);
  return t.layout() == at::kStrided && !t.is_nested() && !t.is_quantized();
}

// One that has kernels; the dispatcher would send a mixture to whichever device it ranks highest.
bool one_device(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& a, const MaybeTensor& b) {
  const at::Device device = q.device();
  return (device.is_cpu() || device.is_cuda()) && k.device() == device && v.device() == device &&
         (!a || a->device() == device) && (!b || b->device() == device);
}

bool window_bound(PyObject* object, int64_t& bound) {
  if (object == Py_None) return bound = -1, true;
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  bound = PyLong_AsLongLongAndOverflow(object, &overflow);
  return !overflow && bound >= -1 && bound <= INT32_MAX;
}

bool number(PyObject* object, double& value) {
  if (PyFloat_CheckExact(object)) return value = PyFloat_AS_DOUBLE(object), true;
  if (PyLong_CheckExact(object)) return value = PyLong_AsDouble(object), !PyErr_Occurred();
  return false;
}

// An output of sdpa lies in memory as its query does: batches, heads and rows one inside the other in the same order.
// None where the query is expanded, or torch.func's, whose outputs are no memory of their own.
std::optional<Tensor> out_like_query(const Tensor& q, const Tensor& v) {
  if (q.dim() != 4 || v.dim() != 4) return std::nullopt;
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode)) return std::nullopt;
  std::array<int64_t, 4> sizes = {q.size(0), q.size(1), q.size(2), v.size(3)}, strides = {0, 0, 0, 1};
  std::array<int, 3> order = {0, 1, 2};
  std::stable_sort(order.begin(), order.end(), [&q](int a, int b) { return q.stride(a) < q.stride(b); });
  int64_t reach = sizes[3];
  for (const int i : order) {
    if (q.stride(i) == 0) return std::nullopt;
    strides[i] = reach;
    reach *= sizes[i];
  }
  return at::empty_strided(sizes, strides, q.options());
}

bool maybe_tensor(PyObject* object, MaybeTensor& t) {
  if (object == Py_None) return true;
  if (!plain(object)) return false;
  t = THPVariable_Unpack(object);
  return true;
}

bool may_be_filled(const Tensor& out, const Tensor& q) {
  return out.device() == q.device() && (!out.is_inference() || c10::InferenceMode::is_enabled());
}

PyObject* pair(Tensor&& a, Tensor&& b) {
  THPObjectPtr first(THPVariable_Wrap(std::move(a))), second(THPVariable_Wrap(std::move(b)));
  return PyTuple_Pack(2, first.get(), second.get());
}

// The call with its GIL released, by the op that fits what is wanted back.
PyObject* answer(const Call& c, bool want_lse) {
  static const auto op = handle<Forward>("fagen::forward");
  static const auto op_lse = handle<ForwardLse>("fagen::forward_lse");
  if (want_lse) {
    std::tuple<Tensor, Tensor> both;
    {
      const pybind11::gil_scoped_release release;
      both = op_lse.call(FAGEN_FIELDS(c));
    }
    return pair(std::move(std::get<0>(both)), std::move(std::get<1>(both)));
  }
  Tensor out;
  {
    const pybind11::gil_scoped_release release;
    out = op.call(FAGEN_FIELDS(c));
  }
  return THPVariable_Wrap(std::move(out));
}

PyObject* answer_into(const Call& c, bool want_lse, Tensor out) {
  static const auto op = handle<ForwardOut>("fagen::forward_out");
  Tensor lse;
  {
    const pybind11::gil_scoped_release release;
    lse = op.call(FAGEN_FIELDS(c), want_lse, out);
  }
  return want_lse ? pair(std::move(out), std::move(lse)) : THPVariable_Wrap(std::move(out));
}

// attention(q, k, v, layout, causal, window, intervals, softcap, alibi_slopes, scale, return_lse, out) of the usual
// kind; None for everything else, which the caller then handles at leisure. `like_query`: the output lies in memory as
// q does.
PyObject* fast_call(PyObject* const* args, Py_ssize_t count, bool like_query) {
  HANDLE_TH_ERRORS
  if (count != 12 || !plain(args[0]) || !plain(args[1]) || !plain(args[2]) || !PyUnicode_Check(args[3])) Py_RETURN_NONE;
  const bool bhsd = PyUnicode_CompareWithASCIIString(args[3], "bhsd") == 0;
  if (!bhsd && PyUnicode_CompareWithASCIIString(args[3], "bshd") != 0) Py_RETURN_NONE;
  if (!PyBool_Check(args[4]) || !PyTuple_CheckExact(args[5]) || PyTuple_GET_SIZE(args[5]) != 2) Py_RETURN_NONE;
  int64_t left = -1, right = -1;
  if (!window_bound(PyTuple_GET_ITEM(args[5], 0), left) || !window_bound(PyTuple_GET_ITEM(args[5], 1), right))
    Py_RETURN_NONE;
  double softcap = 0, scale = 1;
  if (!number(args[7], softcap) || (args[9] != Py_None && !number(args[9], scale))) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  if (!(scale >= kLeast) || !held(softcap, scale)) Py_RETURN_NONE;
  MaybeTensor intervals, alibi_slopes;
  if (!maybe_tensor(args[6], intervals) || !maybe_tensor(args[8], alibi_slopes)) Py_RETURN_NONE;
  if (!PyBool_Check(args[10]) || (args[11] != Py_None && !plain(args[11]))) Py_RETURN_NONE;
  const Tensor &q = THPVariable_Unpack(args[0]), &k = THPVariable_Unpack(args[1]), &v = THPVariable_Unpack(args[2]);
  const Tensor* out = args[11] == Py_None ? nullptr : &THPVariable_Unpack(args[11]);
  if (!one_device(q, k, v, intervals, alibi_slopes) || differentiated(q, k, v, alibi_slopes, out)) Py_RETURN_NONE;
  if ((out && !may_be_filled(*out, q)) || at::impl::torch_function_mode_enabled()) Py_RETURN_NONE;
  const auto maybe_scale = args[9] == Py_None ? std::nullopt : std::optional<double>(scale);
  const Call call{q, k, v, intervals, alibi_slopes, bhsd, args[4] == Py_True, left, right, softcap, maybe_scale};
  if (out) return answer_into(call, args[10] == Py_True, *out);
  const bool as_named = q.dim() == 4 && q.stride(0) >= q.stride(1) && q.stride(1) >= q.stride(2);
  if (!like_query || as_named) return answer(call, args[10] == Py_True);
  auto room = out_like_query(q, v);
  if (!room) Py_RETURN_NONE;
  return answer_into(call, args[10] == Py_True, std::move(*room));
  END_HANDLE_TH_ERRORS
}

PyObject* fast_attention(PyObject*, PyObject* const* args, Py_ssize_t count) { return fast_call(args, count, false); }
PyObject* fast_sdpa(PyObject*, PyObject* const* args, Py_ssize_t count) { return fast_call(args, count, true); }

PyObject* forget_all(PyObject*, PyObject*) {
  forget();
  Py_RETURN_NONE;
}

bool words_of(PyObject* list, std::vector<int64_t>& words) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) words.push_back(PyLong_AsLongLong(PyList_GET_ITEM(list, i)));
  return !PyErr_Occurred();
}

// nearest(plan, sizes): the index of the row of a plan that serves a size, as find() picks it; for tests.
PyObject* nearest_row(PyObject*, PyObject* args) {
  PyObject *plan = nullptr, *sizes = nullptr;
  if (!PyArg_ParseTuple(args, "O!O!", &PyList_Type, &plan, &PyList_Type, &sizes)) return nullptr;
  std::vector<int64_t> words, s;
  if (!words_of(plan, words) || !words_of(sizes, s)) return nullptr;
  if (words.size() < kPlanWords || s.size() != 7) return PyErr_Format(PyExc_ValueError, "a plan and seven sizes");
  const Plan known = plan_of(words.data(), words.size());
  return PyLong_FromLongLong(known.nearest({s[0], s[1], s[2], s[3], s[4], s[5], s[6]}));
}

PyMethodDef methods[] = {
    {"attention", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(fast_attention)), METH_FASTCALL, nullptr},
    {"sdpa", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(fast_sdpa)), METH_FASTCALL, nullptr},
    {"forget", forget_all, METH_NOARGS, nullptr},
    {"nearest", nearest_row, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "kernel", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace fagen

TORCH_LIBRARY(fagen, m) {
  m.def("forward(" FAGEN_SCHEMA ") -> Tensor");
  m.def("forward_lse(" FAGEN_SCHEMA ") -> (Tensor, Tensor)");
  m.def("forward_out(" FAGEN_SCHEMA ", bool want_lse, Tensor(a!) out) -> Tensor");
  // implemented in Python
  m.def("resolve(" FAGEN_SCHEMA ", Tensor? out, bool want_lse) -> int[]");
  m.def("fallback(" FAGEN_SCHEMA ", bool want_lse) -> (Tensor, Tensor)");
  m.def("fail(str what, str numbers) -> ()");
  m.def("refuse(str what, str numbers) -> ()");
  m.def("refuse_overlap(Tensor q, Tensor k, Tensor v, Tensor? intervals, Tensor? alibi_slopes, Tensor out) -> ()");
}

#define FAGEN_REGISTER(m)                     \
  m.impl("forward", &fagen::forward);         \
  m.impl("forward_lse", &fagen::forward_lse); \
  m.impl("forward_out", &fagen::forward_out)

TORCH_LIBRARY_IMPL(fagen, CPU, m) { FAGEN_REGISTER(m); }
TORCH_LIBRARY_IMPL(fagen, CUDA, m) { FAGEN_REGISTER(m); }
TORCH_LIBRARY_IMPL(fagen, Autograd, m) {
  m.impl("forward", &fagen::forward_autograd);
  m.impl("forward_lse", &fagen::forward_lse_autograd);
  m.impl("forward_out", &fagen::forward_out_autograd);
}
TORCH_LIBRARY_IMPL(fagen, ADInplaceOrView, m) { m.impl("forward_out", &fagen::forward_out_in_place); }

PyMODINIT_FUNC PyInit_kernel() { return PyModule_Create(&fagen::module); }
