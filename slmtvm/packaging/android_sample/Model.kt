package org.slmtvm

import android.content.Context
import java.io.Closeable
import java.io.File

/** The model @MODEL@: `Model(context).use { it.complete("def f(x):", 32) }`, not on the main thread. */
class Model(context: Context, threads: Int = 0) : Closeable {
    private var handle = open(unpack(context).path, threads)

    /** The likeliest text after [prompt], of [most] tokens at most. */
    @Synchronized
    fun complete(prompt: String, most: Int): String =
        String(complete(handle, prompt.toByteArray(), most), Charsets.UTF_8)

    @Synchronized
    override fun close() {
        close(handle)
        handle = 0
    }

    /** Weights are mapped, which takes files: assets are copied once for each version of the app. */
    private fun unpack(context: Context): File {
        val version = context.packageManager.getPackageInfo(context.packageName, 0).lastUpdateTime
        val folder = File(context.noBackupFilesDir, "slm-@MODEL@-$version")
        if (folder.isDirectory) return folder
        val partial = File(folder.path + ".partial")
        partial.deleteRecursively()
        partial.mkdirs()
        for (name in context.assets.list("slm/@MODEL@")!!) {
            context.assets.open("slm/@MODEL@/$name").use { from ->
                File(partial, name).outputStream().use { from.copyTo(it) }
            }
        }
        check(partial.renameTo(folder)) { "${folder.path} cannot be made" }
        return folder
    }

    private companion object {
        init {
            System.loadLibrary("@LIBRARY@")
            System.loadLibrary("slm_jni")
        }

        @JvmStatic external fun open(bundle: String, threads: Int): Long
        @JvmStatic external fun complete(handle: Long, prompt: ByteArray, most: Int): ByteArray
        @JvmStatic external fun close(handle: Long)
    }
}
