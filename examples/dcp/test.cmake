# SPDX-License-Identifier: Apache-2.0
# The commands of the tool, on checkpoints that PyTorch and others wrote. TOOL, GOLDEN (tests/golden), WORK (an empty folder to make), LAUNCHER (of cp, with
# commas between its words; or nothing).
cmake_minimum_required(VERSION 3.22)
file(REMOVE_RECURSE ${WORK})
file(MAKE_DIRECTORY ${WORK})

# run(<status> <text that must be in the output> <arguments>...): the output is in `out` afterwards.
function(run status text)
  set(launcher "")
  if("cp" IN_LIST ARGN)
    string(REPLACE "," ";" launcher "${LAUNCHER}")
  endif()
  execute_process(COMMAND ${launcher} ${TOOL} ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE errors)
  if(NOT result EQUAL status)
    message(FATAL_ERROR "dcp ${ARGN}\nended with ${result}, not ${status}\n${output}${errors}")
  endif()
  string(FIND "${output}${errors}" "${text}" at)
  if(at EQUAL -1)
    message(FATAL_ERROR "dcp ${ARGN}\ndid not say \"${text}\"\n${output}${errors}")
  endif()
  set(out "${output}" PARENT_SCOPE)
endfunction()

set(torch ${GOLDEN}/torch_dcp)
set(trained ${torch}/fsdp2_adam_2/ckpt)

# ls knows each format by looking.
run(0 "PyTorch distributed checkpoint: 27 tensors" ls ${trained})
run(0 "torch.save: 9 tensors" ls ${torch}/torch_save_roundtrip/plain.pt)
run(0 "quantized safetensors" ls ${GOLDEN}/quantized/fp8_block128/ckpt)
run(0 "GGUF" ls ${GOLDEN}/gguf/all_types/model.gguf)
run(0 "safetensors" ls ${GOLDEN}/hf/sharded_2/ckpt)
run(1 "there is nothing" ls ${WORK}/nowhere)
run(0 "" ls --json ${trained})
string(JSON shape GET "${out}" tensors model.0.weight shape 0)
string(JSON values LENGTH "${out}" values)
if(NOT shape EQUAL 16 OR NOT values EQUAL 14)
  message(FATAL_ERROR "ls --json says ${shape}, ${values}\n${out}")
endif()

# verify: what PyTorch wrote has CRC-32s, what this library writes has checksums of everything.
run(0 "verified" verify ${trained})
run(1 "CRC-32" verify ${GOLDEN}/bad_torch/dcp_crc_flip)
run(1 "w" verify ${GOLDEN}/bad_torch/dcp_data_truncated)

# cp to Hugging Face and back, with nothing lost.
run(0 "wrote 27 tensors" cp ${trained} ${WORK}/hf)
run(0 "equal" diff ${trained} ${WORK}/hf)
run(1 "already" cp ${trained} ${WORK}/hf)
run(0 "wrote 27 tensors" cp ${WORK}/hf ${WORK}/torch --to torch)
run(0 "equal" diff ${trained} ${WORK}/torch)
run(0 "verified" verify ${WORK}/torch)
run(0 "wrote 27 tensors" cp ${WORK}/hf ${WORK}/torch2 --to torch)
run(0 "by their checksums" diff ${WORK}/torch ${WORK}/torch2)
run(0 "wrote 6 tensors" cp ${trained} ${WORK}/part --only model --max-file-bytes 600B)
if(NOT EXISTS ${WORK}/part/model.safetensors.index.json OR NOT EXISTS ${WORK}/part/model-00004-of-00004.safetensors)
  file(GLOB_RECURSE files RELATIVE ${WORK}/part ${WORK}/part/*)
  message(FATAL_ERROR "--max-file-bytes left ${files}")
endif()
run(1 "only in" diff ${trained} ${WORK}/part)
run(1 "no entry" cp ${trained} ${WORK}/none --only nothing)
run(0 "wrote" cp ${torch}/torch_save_roundtrip/plain.pt ${WORK}/plain)
run(0 "equal" diff ${torch}/torch_save_roundtrip/plain.pt ${WORK}/plain)
run(0 "wrote" cp ${GOLDEN}/quantized/fp8_block128/ckpt ${WORK}/fp8 --decode-to F32)
run(0 "F32" ls ${WORK}/fp8)

# A damaged byte is found, and named.
file(SIZE ${WORK}/torch/__0_0.distcp size)
execute_process(COMMAND sh -c "printf X | dd of='${WORK}/torch/__0_0.distcp' bs=1 seek=$((${size} / 2)) conv=notrunc status=none")
run(1 "__0_0.distcp" verify ${WORK}/torch)

# diff finds the element.
run(2 "there is nothing" diff ${trained} ${WORK}/nowhere)
run(1 "elements differ" diff ${torch}/plan_caching_second/ckpt ${torch}/plan_caching_second/ckpt_first)

run(0 "0 0 0 1 1
0 0 0 1 1
0 0 0 1 1
0 0 0 1 1
2 2 2 3 3
" layout 7x5 S0,S1 2x2)
run(0 "ranks 0 1  [4, 6] at [0, 0], 24 elements" layout 8x6 S0,R 2x2)
run(0 "rank 3  nothing" layout 3 S0 4)
run(1 "a placement of 1 axes" layout 8x6 S0 2x2)
run(1 "no dimension" layout 8x6 S2 4)
