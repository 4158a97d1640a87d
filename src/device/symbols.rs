//! The functions of CUDA's libraries that this binary refers to, defined here: each one jumps to the address in its slot of a table.
//!
//! candle links CUDA's libraries, so that a binary would not start on a machine without them. The linker takes the first
//! definition of a name, and leaves out a shared library that no name is taken from: with the definitions here, no CUDA library
//! is needed at the start. [`super::libraries`] fills the table before the first device is opened.
//!
//! A name that this list lacks and that the code refers to brings its library back among those that are needed at the start. The test
//! `tests/it/device.rs` finds that. A name that the code does not refer to costs a slot and a jump. This is so with LLVM's linker, which
//! is rustc's own on x86_64; GNU's counts references from code that it leaves out, and needs the libraries at the start.
#![allow(
    unsafe_code,
    reason = "the functions are defined in assembly, which passes any arguments through"
)]

use std::ffi::{CStr, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};

#[cfg(not(all(
    target_os = "linux",
    any(target_arch = "x86_64", target_arch = "aarch64")
)))]
compile_error!("the feature `cuda` is for Linux on x86_64 or aarch64");

/// Where functions come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Library {
    Driver,
    CublasLt,
    Cublas,
    Curand,
    Cudnn,
    /// candle's kernels for quantised and mixture-of-experts models, which are compiled into a static library of 32 MB that needs one more
    /// CUDA library before `main`. coffey calls none of them: with the definitions here, the linker leaves the library out.
    Quantised,
}

/// Defines a function that jumps to the address in slot `$function` of [`TABLE`]. It changes no register that holds an argument.
macro_rules! define {
    ($function:ident) => {
        #[cfg(target_arch = "x86_64")]
        std::arch::global_asm!(
            concat!(".globl ", stringify!($function)),
            concat!(".hidden ", stringify!($function)),
            concat!(".type ", stringify!($function), ", @function"),
            concat!(stringify!($function), ":"),
            "jmp qword ptr [rip + {table} + {offset}]",
            concat!(".size ", stringify!($function), ", . - ", stringify!($function)),
            table = sym TABLE,
            offset = const Function::$function as usize * size_of::<usize>(),
        );
        #[cfg(target_arch = "aarch64")]
        std::arch::global_asm!(
            concat!(".globl ", stringify!($function)),
            concat!(".hidden ", stringify!($function)),
            concat!(".type ", stringify!($function), ", %function"),
            concat!(stringify!($function), ":"),
            "adrp x16, {table} + {offset}",
            "ldr x16, [x16, :lo12:{table} + {offset}]",
            "br x16",
            concat!(".size ", stringify!($function), ", . - ", stringify!($function)),
            table = sym TABLE,
            offset = const Function::$function as usize * size_of::<usize>(),
        );
    };
}

macro_rules! functions {
    ($($library:ident { $($function:ident)+ })+) => {
        #[allow(
            non_camel_case_types,
            clippy::enum_variant_names,
            reason = "the names of C functions"
        )]
        #[derive(Clone, Copy)]
        enum Function {
            $($($function,)+)+
        }

        /// Every function: its library and its name, with a NUL at the end.
        const FUNCTIONS: &[(Library, &str)] = &[
            $($((Library::$library, concat!(stringify!($function), "\0")),)+)+
        ];

        /// The address of each function. Until its library is loaded, that is [`absent`].
        static TABLE: [AtomicPtr<c_void>; FUNCTIONS.len()] = [
            $($(AtomicPtr::new(
                absent::<{ Function::$function as usize }> as extern "C" fn() -> ! as *mut c_void,
            ),)+)+
        ];

        $($(define!($function);)+)+
    };
}

functions! {
    Driver {
        cuCtxCreate_v3 cuCtxCreate_v4 cuCtxDestroy_v2 cuCtxGetCacheConfig cuCtxGetCurrent cuCtxGetDevice cuCtxGetLimit
        cuCtxGetStreamPriorityRange cuCtxSetCacheConfig cuCtxSetCurrent cuCtxSetFlags cuCtxSetLimit cuCtxSynchronize
        cuDestroyExternalMemory
        cuDeviceGet cuDeviceGetAttribute cuDeviceGetCount cuDeviceGetDefaultMemPool cuDeviceGetMemPool cuDeviceGetName
        cuDeviceGetPCIBusId cuDeviceGetUuid cuDeviceGetUuid_v2 cuDevicePrimaryCtxRelease_v2 cuDevicePrimaryCtxRetain cuDeviceSetMemPool
        cuDeviceTotalMem_v2 cuDriverGetVersion
        cuEventCreate cuEventDestroy_v2 cuEventElapsedTime cuEventElapsedTime_v2 cuEventQuery cuEventRecord cuEventRecordWithFlags
        cuEventSynchronize cuExternalMemoryGetMappedBuffer
        cuFuncGetAttribute cuFuncLoad cuFuncSetAttribute cuFuncSetCacheConfig cuGetErrorName cuGetErrorString
        cuGraphDestroy cuGraphExecDestroy cuGraphInstantiateWithFlags cuGraphLaunch cuGraphUpload
        cuImportExternalMemory cuInit cuLaunchCooperativeKernel cuLaunchHostFunc cuLaunchKernel cuLaunchKernelEx
        cuMemAdvise_v2 cuMemAllocAsync cuMemAllocFromPoolAsync cuMemAllocHost_v2 cuMemAllocManaged cuMemAlloc_v2 cuMemFreeAsync
        cuMemFreeHost cuMemFree_v2 cuMemGetInfo_v2 cuMemHostAlloc cuMemHostGetDevicePointer_v2 cuMemHostRegister_v2 cuMemHostUnregister
        cuMemPoolCreate cuMemPoolDestroy cuMemPoolGetAttribute cuMemPoolSetAttribute cuMemPoolTrimTo cuMemPrefetchAsync_v2
        cuMemcpy2DAsync_v2 cuMemcpyAsync cuMemcpyDtoDAsync_v2 cuMemcpyDtoD_v2 cuMemcpyDtoHAsync_v2 cuMemcpyDtoH_v2
        cuMemcpyHtoDAsync_v2 cuMemcpyHtoD_v2 cuMemcpyPeerAsync
        cuMemsetD16Async cuMemsetD32Async cuMemsetD8Async cuMemsetD8_v2
        cuModuleGetFunction cuModuleGetGlobal_v2 cuModuleLoad cuModuleLoadData cuModuleLoadDataEx cuModuleUnload
        cuOccupancyAvailableDynamicSMemPerBlock cuOccupancyMaxActiveBlocksPerMultiprocessor
        cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags cuOccupancyMaxActiveClusters cuOccupancyMaxPotentialBlockSize
        cuOccupancyMaxPotentialBlockSizeWithFlags cuOccupancyMaxPotentialClusterSize
        cuPointerGetAttribute cuProfilerStart cuProfilerStop
        cuStreamAttachMemAsync cuStreamBeginCapture_v2 cuStreamCreate cuStreamCreateWithPriority cuStreamDestroy_v2
        cuStreamEndCapture cuStreamIsCapturing cuStreamQuery cuStreamSynchronize cuStreamWaitEvent
    }
    CublasLt {
        cublasLtCreate cublasLtDestroy cublasLtGetVersion cublasLtLoggerOpenFile cublasLtLoggerSetLevel cublasLtMatmul
        cublasLtMatmulAlgoGetHeuristic cublasLtMatmulDescCreate cublasLtMatmulDescDestroy cublasLtMatmulDescSetAttribute
        cublasLtMatmulPreferenceCreate cublasLtMatmulPreferenceDestroy cublasLtMatmulPreferenceSetAttribute cublasLtMatrixLayoutCreate
        cublasLtMatrixLayoutDestroy cublasLtMatrixLayoutSetAttribute cublasLtMatrixTransform cublasLtMatrixTransformDescCreate
        cublasLtMatrixTransformDescDestroy cublasLtMatrixTransformDescSetAttribute
    }
    Cublas {
        cublasCreate_v2 cublasDasum_v2 cublasDestroy_v2 cublasDgemmStridedBatched cublasDgemm_v2 cublasDgemv_v2 cublasGemmEx
        cublasGemmBatchedEx cublasGemmGroupedBatchedEx cublasGemmStridedBatchedEx cublasGetMathMode cublasGetPointerMode_v2
        cublasGetVersion_v2 cublasHgemm cublasHgemmStridedBatched cublasSasum_v2 cublasSetMathMode cublasSetPointerMode_v2
        cublasSetStream_v2 cublasSetWorkspace_v2 cublasSgemmStridedBatched cublasSgemm_v2 cublasSgemv_v2
    }
    Curand {
        curandCreateGenerator curandDestroyGenerator curandGenerate curandGenerateLogNormal curandGenerateLogNormalDouble
        curandGenerateLongLong curandGenerateNormal curandGenerateNormalDouble curandGeneratePoisson curandGenerateUniform
        curandGenerateUniformDouble curandSetGeneratorOffset curandSetPseudoRandomGeneratorSeed curandSetStream
    }
    Cudnn {
        cudnnActivationBackward cudnnActivationForward cudnnAddTensor cudnnAdvInferVersionCheck cudnnAdvTrainVersionCheck
        cudnnAdvVersionCheck
        cudnnBackendCreateDescriptor cudnnBackendDestroyDescriptor cudnnBackendExecute cudnnBackendFinalize cudnnBackendGetAttribute
        cudnnBackendInitialize cudnnBackendSetAttribute
        cudnnCnnInferVersionCheck cudnnCnnTrainVersionCheck cudnnCnnVersionCheck
        cudnnConvolutionBackwardBias cudnnConvolutionBackwardData cudnnConvolutionBackwardFilter
        cudnnConvolutionBiasActivationForward cudnnConvolutionForward
        cudnnCreate cudnnCreateActivationDescriptor cudnnCreateConvolutionDescriptor cudnnCreateFilterDescriptor
        cudnnCreatePoolingDescriptor cudnnCreateReduceTensorDescriptor cudnnCreateTensorDescriptor
        cudnnDestroy cudnnDestroyActivationDescriptor cudnnDestroyConvolutionDescriptor cudnnDestroyFilterDescriptor
        cudnnDestroyPoolingDescriptor cudnnDestroyReduceTensorDescriptor cudnnDestroyTensorDescriptor
        cudnnFindConvolutionBackwardDataAlgorithm cudnnFindConvolutionBackwardDataAlgorithmEx
        cudnnFindConvolutionBackwardFilterAlgorithm cudnnFindConvolutionBackwardFilterAlgorithmEx
        cudnnFindConvolutionForwardAlgorithm cudnnFindConvolutionForwardAlgorithmEx
        cudnnGetConvolutionBackwardDataAlgorithmMaxCount cudnnGetConvolutionBackwardDataAlgorithm_v7
        cudnnGetConvolutionBackwardDataWorkspaceSize
        cudnnGetConvolutionBackwardFilterAlgorithmMaxCount cudnnGetConvolutionBackwardFilterAlgorithm_v7
        cudnnGetConvolutionBackwardFilterWorkspaceSize
        cudnnGetConvolutionForwardAlgorithmMaxCount cudnnGetConvolutionForwardAlgorithm_v7 cudnnGetConvolutionForwardWorkspaceSize
        cudnnGetCudartVersion cudnnGetErrorString cudnnGetLastErrorString cudnnGetReductionIndicesSize cudnnGetReductionWorkspaceSize
        cudnnGetVersion cudnnOpsInferVersionCheck cudnnOpsTrainVersionCheck cudnnOpsVersionCheck cudnnPoolingForward cudnnReduceTensor
        cudnnSetActivationDescriptor cudnnSetConvolution2dDescriptor cudnnSetConvolutionGroupCount cudnnSetConvolutionMathType
        cudnnSetConvolutionNdDescriptor cudnnSetFilter4dDescriptor cudnnSetFilterNdDescriptor cudnnSetPoolingNdDescriptor
        cudnnSetReduceTensorDescriptor cudnnSetStream cudnnSetTensor4dDescriptor cudnnSetTensor4dDescriptorEx
        cudnnSetTensorNdDescriptor cudnnSoftmaxForward cudnnTransformTensor
    }
    Quantised {
        moe_gemm_wmma moe_gemm_gguf moe_gemm_gguf_prefill launch_mmvq_gguf_q4_0_bf16_plain launch_mmvq_gguf_q4_1_bf16_plain
        launch_mmvq_gguf_q5_0_bf16_plain launch_mmvq_gguf_q5_1_bf16_plain launch_mmvq_gguf_q8_0_bf16_plain
        launch_mmvq_gguf_q2_k_bf16_plain launch_mmvq_gguf_q3_k_bf16_plain launch_mmvq_gguf_q4_k_bf16_plain
        launch_mmvq_gguf_q5_k_bf16_plain launch_mmvq_gguf_q6_k_bf16_plain launch_mmvq_gguf_q4_0_f32_plain
        launch_mmvq_gguf_q4_1_f32_plain launch_mmvq_gguf_q5_0_f32_plain launch_mmvq_gguf_q5_1_f32_plain
        launch_mmvq_gguf_q8_0_f32_plain launch_mmvq_gguf_q2_k_f32_plain launch_mmvq_gguf_q3_k_f32_plain
        launch_mmvq_gguf_q4_k_f32_plain launch_mmvq_gguf_q5_k_f32_plain launch_mmvq_gguf_q6_k_f32_plain
        launch_mmvq_gguf_q4_0_f16_plain launch_mmvq_gguf_q4_1_f16_plain launch_mmvq_gguf_q5_0_f16_plain
        launch_mmvq_gguf_q5_1_f16_plain launch_mmvq_gguf_q8_0_f16_plain launch_mmvq_gguf_q2_k_f16_plain
        launch_mmvq_gguf_q3_k_f16_plain launch_mmvq_gguf_q4_k_f16_plain launch_mmvq_gguf_q5_k_f16_plain
        launch_mmvq_gguf_q6_k_f16_plain launch_mmvq_gguf_quantize_q8_1_bf16 launch_mmvq_gguf_quantize_q8_1_f16
        launch_mmvq_gguf_quantize_q8_1_f32 launch_mmq_quantize_q8_1_D4 launch_mmq_quantize_q8_1_DS4
        launch_mmq_quantize_q8_1_D2S6 launch_mmq_gguf_q4_0 launch_mmq_gguf_q4_1 launch_mmq_gguf_q5_0 launch_mmq_gguf_q5_1
        launch_mmq_gguf_q8_0 launch_mmq_gguf_q2_k launch_mmq_gguf_q3_k launch_mmq_gguf_q4_k launch_mmq_gguf_q5_k
        launch_mmq_gguf_q6_k
    }
}

extern "C" fn absent<const FUNCTION: usize>() -> ! {
    let (library, name) = FUNCTIONS[FUNCTION];
    let name = name.trim_end_matches('\0');
    match library {
        Library::Quantised => {
            errln!("error: {name}: candle's quantised kernels are not part of this binary")
        }
        library => errln!(
            "error: {name} is missing: the {} on this machine is too old for this binary, or no CUDA device was opened",
            library.name()
        ),
    }
    // The caller is C code that expects a value.
    std::process::abort()
}

impl Library {
    /// The library in words.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Driver => "NVIDIA driver",
            Self::CublasLt => "cuBLASLt",
            Self::Cublas => "cuBLAS",
            Self::Curand => "cuRAND",
            Self::Cudnn => "cuDNN",
            Self::Quantised => "candle's quantised kernels",
        }
    }
}

/// Fills the slots of `library`'s functions with the addresses that `find` returns. A function that is not found stays [`absent`]: it
/// is an error when it is called.
///
/// # Safety
/// Each address that `find` returns is that of the C function of this name.
pub(super) unsafe fn fill(library: Library, find: impl Fn(&CStr) -> Option<*mut c_void>) {
    for (&(of, name), slot) in FUNCTIONS.iter().zip(&TABLE) {
        if of == library
            && let Ok(name) = CStr::from_bytes_with_nul(name.as_bytes())
            && let Some(address) = find(name)
        {
            slot.store(address, Ordering::Release);
        }
    }
}
