package org.pockc

import java.io.Closeable
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder

/**
 * A program and its state on the device: trains, predicts, saves.
 *
 *     Session(File(context.filesDir, "model.pock"), threads = 4).use { session ->
 *         val pixels = session.buffer("train_step", "pixel_values")   // once; filled before each step
 *         val labels = session.buffer("train_step", "labels")
 *         pixels.asFloatBuffer().put(batch); labels.asLongBuffer().put(classes)
 *         val loss = session.trainStep(mapOf("pixel_values" to pixels, "labels" to labels))
 *         session.save(File(context.filesDir, "tuned.ckpt"))
 *     }
 *
 * For one thread at a time: keep it in a background dispatcher of one thread. The model must be a file: copy an asset
 * into filesDir first.
 */
class Session(model: File, threads: Int = 1) : Closeable {
    private var handle = Native.open(model.path, threads)

    /** JSON: the model, scheme, loss, optimizer. */
    val metadata: String get() = Native.metadata(live())

    /** What the session took, as the build said. */
    val arenaBytes: Long get() = Native.arenaBytes(live())

    /** Names of an entry's inputs. */
    fun inputs(entry: String): List<String> = names(entry, INPUT)

    /** Names of an entry's outputs. */
    fun outputs(entry: String): List<String> = names(entry, OUTPUT)

    /** A new buffer for an input or output of an entry. */
    fun buffer(entry: String, name: String): ByteBuffer {
        for (role in intArrayOf(INPUT, OUTPUT)) {
            val index = names(entry, role).indexOf(name)
            if (index >= 0) return allocate(Native.type(live(), entry, role, index))
        }
        throw IllegalArgumentException("$entry has no input or output $name, but ${inputs(entry)} and ${outputs(entry)}")
    }

    /** One step of training; the loss. */
    fun trainStep(inputs: Map<String, ByteBuffer>): Float {
        val loss = buffer("train_step", "loss")
        run("train_step", inputs, mapOf("loss" to loss))
        return loss.getFloat(0)
    }

    /** Runs an entry; what `outputs` names is written into its buffers. */
    fun run(entry: String, inputs: Map<String, ByteBuffer>, outputs: Map<String, ByteBuffer>) = Native.run(
        live(), entry,
        inputs.keys.toTypedArray(), inputs.values.toTypedArray(),
        outputs.keys.toTypedArray(), outputs.values.toTypedArray()
    )

    /** A checkpoint, written whole or not at all. `cursor` is JSON of your own, given back by [load]. */
    fun save(file: File, cursor: String? = null) = Native.save(live(), file.path, cursor)

    /** Goes on from a checkpoint of the same program. */
    fun load(file: File): String? = Native.load(live(), file.path)

    override fun close() {
        if (handle != 0L) Native.close(handle)
        handle = 0L
    }

    private fun live(): Long = check(handle != 0L) { "the session is closed" }.let { handle }

    private fun names(entry: String, role: Int): List<String> =
        generateSequence(0) { it + 1 }.map { Native.name(live(), entry, role, it) }.takeWhile { it != null }
            .map { it!! }.toList()

    private fun allocate(type: LongArray): ByteBuffer {
        val bytes = type.drop(1).fold(ELEMENT_BYTES[type[0].toInt()]) { product, size -> product * size }
        return ByteBuffer.allocateDirect(Math.toIntExact(bytes)).order(ByteOrder.nativeOrder())
    }

    private companion object {
        const val INPUT = 0
        const val OUTPUT = 1
        val ELEMENT_BYTES = longArrayOf(4, 8, 4, 1, 1)
    }
}
