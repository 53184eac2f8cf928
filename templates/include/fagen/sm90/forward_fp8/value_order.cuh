// The order of v that O += P v wants: written once, before any kernel, so that none has to transpose or permute.
//
// wgmma takes fp8 operands only with k side by side, which are the keys here. A block of 32 keys lies in groups of 8
// columns of v; a group has two cores of 128 bytes, one for each 16 keys: 8 columns of 16 bytes. That is how wgmma
// reads an operand that is not swizzled, so that any number of blocks is one copy.
//
// The keys of a core are permuted. A lane of a warp has the scores of keys 2 l, 2 l + 1, 2 l + 8, 2 l + 9 of each 16
// (l = lane % 4), and must give the weights of places 4 l .. 4 l + 3: with the keys in this order they are the same.
#pragma once

namespace fagen {

constexpr int kBlockKeys = 32, kCoreKeys = 16, kCoreColumns = 8;
constexpr int kCoreBytes = kCoreKeys * kCoreColumns, kGroupBytes = kBlockKeys * kCoreColumns;

// The key that lies in a place of a block.
constexpr int key_in_place(int place) {
  return place / kCoreKeys * kCoreKeys + place % kCoreKeys / 4 * 2 + place % 2 + place % 4 / 2 * 8;
}
// The byte of a block where a column of a place lies.
constexpr int byte_of(int place, int column) {
  return column / kCoreColumns * kGroupBytes + place / kCoreKeys * kCoreBytes + column % kCoreColumns * kCoreKeys +
         place % kCoreKeys;
}

}  // namespace fagen
