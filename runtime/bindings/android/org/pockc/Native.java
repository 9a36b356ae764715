package org.pockc;

import java.nio.ByteBuffer;

/**
 * The C ABI of the runtime (pockc/runtime.h), call by call; pockc_jni.c has the other side. Applications use
 * {@code Session} (Session.kt), or write their own wrapper.
 *
 * <p>A handle is valid from open to close, for one thread at a time. Tensors are direct buffers of exactly their
 * tensor's size, in native byte order. Roles are 0 for inputs, 1 for outputs, 2 for states, whose entry is not looked
 * at. What fails throws IllegalStateException, or IllegalArgumentException where a buffer is at fault.
 */
public final class Native {
  static {
    System.loadLibrary("pockc_jni");
  }

  private Native() {}

  /** Maps a .pock file and makes a session over it. */
  public static native long open(String path, int threads);

  /** Frees both; the handle is not to be used again. */
  public static native void close(long handle);

  /** The program's metadata, as JSON. */
  public static native String metadata(long handle);

  /** The name of a tensor, or null where the entry has no more. */
  public static native String name(long handle, String entry, int role, int index);

  /** Its element type (0 float, 1 long, 2 int, 3 byte, 4 boolean), then its dimensions. */
  public static native long[] type(long handle, String entry, int role, int index);

  /** Runs train_step, eval_step or infer: all inputs, any of the outputs. */
  public static native void run(
      long handle, String entry, String[] inputNames, ByteBuffer[] inputs, String[] outputNames, ByteBuffer[] outputs);

  /** Copies a parameter, or another state, out of the session. */
  public static native void readState(long handle, String name, ByteBuffer to);

  /** Writes a checkpoint, whole or not at all; the cursor is JSON of the caller's own, or null. */
  public static native void save(long handle, String path, String cursor);

  /** Goes on from a checkpoint; returns its cursor, or null. */
  public static native String load(long handle, String path);

  /** The memory that the session took, as planned when the program was built. */
  public static native long arenaBytes(long handle);
}
