// What a block owns: a tile of the result, and of the pixels that are summed over a split.
#pragma once
#include "device.h"
#include "plan.h"

namespace rwn {

struct Share {
  int tile, split;
  int first_channel, first_column, first_filter;  // of the tile
  int begin, end;                                 // of the split, in tiles of pixels (depthwise: rows of the output)
};

RWN_DEVICE Share share_of_block(const Task& task) {
  Share share;
  share.tile = blockIdx.x, share.split = blockIdx.y;
  const int column_tile = share.tile / task.channel_tiles;
  share.first_channel = (share.tile - column_tile * task.channel_tiles) * task.tile_channels;
  share.first_column = column_tile * task.tile_columns;
  share.first_filter = task.geometry.filter_of(share.first_column);
  share.begin = split_begin(share.split, task.splits, task.tiles);
  share.end = split_begin(share.split + 1, task.splits, task.tiles);
  return share;
}

}  // namespace rwn
